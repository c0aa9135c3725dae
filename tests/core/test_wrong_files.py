"""Layouts, plans, models, hardware files and descriptions with values of another type, or files of another kind, are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from partinf.cli.model_place import read_lines
from partinf.experiment.description import read_experiment
from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput
from partinf.hardware.hardware_file import read_hardware, write_hardware
from partinf.layout.files import layout_from_toml, load_layout
from partinf.model.load import config_from_toml, load_model_config
from partinf.planner.files import plan_from_toml, saved_plan
from partinf.simulation.arrivals import read_trace
from tests.core.test_hardware_file import CHIP

PLAN = "palm-62b-low-latency"
SAVED = """\
description = "a saved plan"
model = "palm-62b"
slice = "v4:2x2x4"
mesh = "x:2,y:2,z:4"
weights = "int8"
kv = "bf16"
prefill_from_tokens = 1370
chosen_for = { batch = 32, prefill_batch = 1, input = 1984, output = 64, context = 2016, objective = "latency" }
predicted = { prefill_seconds = 0.159, decode_seconds = 0.0114 }

[axes]
x = "embed"
y = "ffn"
z = "ffn"

[prefill]
gather = ["x"]
attention = { x = "heads", y = "heads", z = "heads" }

[decode]
gather = []
attention = { x = "batch", y = "batch", z = "batch" }
"""
AXES = '[axes]\nx = "embed"\ny = "ffn"\nz = "ffn"\n'
PREFILL = '[prefill]\ngather = ["x"]\nattention = { x = "heads", y = "heads", z = "heads" }'
BATCH = "chosen_for = { batch = 32,"


def offences(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(InvalidInput) as error:
        call(*args)
    return "\n".join(error.value.offences)


def changed(old: str, new: str) -> str:
    assert old in SAVED
    return SAVED.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('gather = ["x"]', "gather = 3", "file [prefill]: gather = 3; expected a list of strings"),
        ('gather = ["x"]', 'gather = ["x", 1]', "gather = ['x', 1]; expected a list of strings"),
        ('attention = { x = "batch", y = "batch", z = "batch" }', 'attention = "x"', "file [decode]: attention = 'x'; expected a table"),
        (AXES, "axes = []\n", "axes = []; expected a table of strings"),
        (AXES, "[axes]\n", "[axes] is empty"),
        ('z = "ffn"', "z = 1", "'z': 1}; expected a table of strings"),
        (
            '[prefill]\ngather = ["x"]\nattention = { x = "heads", y = "heads", z = "heads" }',
            "[prefill]",
            "[prefill]: 'attention' is missing",
        ),
        ("[decode]\ngather = []", "[decode]\nloop = 3\ngather = []", "loop = 3; expected a table"),
        ("[decode]\ngather = []", "[decode]\nloop = { axis = 1 }\ngather = []", "axis = 1; expected a string"),
        ('kv = "bf16"', 'kv = "x"', "kv = 'x'; expected one of bf16, int8, f32"),
        ('mesh = "x:2,y:2,z:4"', 'mesh = ["x"]', "mesh = ['x']; expected a string"),
        ('slice = "v4:2x2x4"', "slice = [1]", "slice = [1]; expected a string"),
        ("prefill_from_tokens = 1370", "prefill_from_tokens = 1e400", "prefill_from_tokens = inf; expected a whole number"),
        (
            "chosen_for = { batch = 32,",
            "chosen_for = { batch = true,",
            "[chosen_for]: batch = true; expected a whole number from 1 to 1,048,576",
        ),
        (BATCH, "chosen_for = { bath = 32,", "unknown key 'bath'; did you mean 'batch'?"),
    ],
)
def test_values_of_another_type_in_a_plan(old: str, new: str, words: str) -> None:
    assert words in offences(plan_from_toml, changed(old, new), "file")


def test_many_axes_are_refused_before_they_are_looked_at() -> None:
    axes = "\n".join(f'a{n} = "ffn"' for n in range(5000))
    attention = ", ".join(f'a{n} = "heads"' for n in range(5000))
    assert "5000 axes; a mesh has at most 16" in offences(
        layout_from_toml, f"[axes]\n{axes}\n[decode]\nattention = {{ {attention} }}", "file"
    )


def test_the_workload_of_a_saved_plan() -> None:
    plan, workload = saved_plan(resources.find("layouts", PLAN).read_text(), PLAN)
    assert (workload.batch, workload.input_len, workload.output_len, workload.prefill_batch) == (32, 1984, 64, 1)
    assert (workload.weights, workload.kv) == (plan.weights, plan.kv)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('family = "cpu"', 'family = "abacus"', "family = 'abacus'; expected one of"),
        ("peak_bf16 = ", "peak_bf16 = 0.0 #", "peak_bf16 = 0.0; expected a number from 0.001"),
        ("sizes = [1.0, 4.0]", "sizes = [4.0, 1.0]", "[products.f32]: sizes that rise, and as many rates"),
        ("sizes = [1.0, 4.0]", "sizes = []", "[products.f32]: sizes that rise, and as many rates"),
        ("{ ways = 8,", "{ ways = 2,", "all-gather: ways from 2 to 1,048,576 are expected, each once"),
        ("[collectives]", "[collectives]\nx = 3", "x = 3; expected a list of tables"),
        ("[memory]", "[memory]\nx = 3", "unknown key 'x'"),
        ("devices = 8", "devices = 8.5", "devices = 8.5; expected a whole number"),
    ],
)
def test_values_of_another_type_in_a_hardware_file(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = write_hardware(CHIP)
    assert old in text
    (tmp_path / "x.toml").write_text(text.replace(old, new, 1))
    assert words in offences(read_hardware, tmp_path / "x.toml")


def test_values_of_another_type_in_a_model() -> None:
    text = resources.find("models", "llama-3-8b").read_text().replace("rotation = { theta = 500000.0 }\n", "")
    assert "rotation = 3; expected a table" in offences(config_from_toml, text + "\nrotation = 3\n", "mine")
    wrong = offences(config_from_toml, text + '\nrotation = { scaling = "linear", facto = 1 }\n', "mine")
    assert "'factor' is missing" in wrong
    assert "unknown key 'facto'" in wrong
    assert "norm = ['rms']; expected one of rms, rms-1p, layer" in offences(config_from_toml, text + '\nnorm = ["rms"]\n', "mine")


@pytest.mark.parametrize("content", [b"GGUF\x03\x00\x00\x00\xff", b"x = " + b"[" * 5000, b"\xff" * 100, b"a." * 20_000 + b"a = 1", b"\x00"])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "given.toml"
    file.write_bytes(content)
    for read in (load_layout, load_model_config):
        assert "given.toml" in offences(read, str(file)) or "model given" in offences(read, str(file))
    for read_path in (read_hardware, read_experiment, read_trace):
        assert "given.toml" in offences(read_path, file)
    if content[-1] == 0xFF:
        assert "--prompts" in offences(read_lines, None, str(file), "--prompts")


def test_a_directory_and_the_null_device(tmp_path: Path) -> None:
    for read in (read_hardware, read_experiment, read_trace):
        offences(read, tmp_path)
        offences(read, Path("/dev/null"))
    assert "--prompts /dev/null: nothing in it" in offences(read_lines, None, "/dev/null", "--prompts")
    assert "a directory" in offences(read_lines, None, str(tmp_path), "--texts")
    assert "unknown layout" in offences(load_layout, str(tmp_path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("command = {}", "unknown key 'command'"),
        ("max_batch = 1000000000", "max_batch = 1000000000; expected a whole number from 1 to 1,048,576"),
        ("rounds = 1.0", "rounds = 1.0; expected a whole number"),
        ("mesh = []", "mesh = []; expected a string"),
        ("random_weights = 1", "random_weights = 1; expected true or false"),
        ('lengths = "fixed:1000000:1"\nrequests = 1000', "prompt tokens in all = 1000000000; it must be at most 4,194,304"),
        ("page_size = 0x" + "f" * 5000, "page_size = (a whole number of 6021 digits)"),
    ],
)
def test_values_out_of_range_in_a_description(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(f'model = "demo"\nslice = "cpu:2x2"\n{line}\n')
    assert words in offences(read_experiment, file)
