"""What windows save in the priced program: a core counts the keys that its layers see, and all else is as without."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from partinf.cli import main
from partinf.cost.attention import _seen
from partinf.cost.ledger import Entry, EntryKind, Ledger
from partinf.cost.pricing import Pricing
from partinf.cost.program import PLAIN, TILED, Program
from partinf.cost.split import Shares, StepShape, StepSplit
from partinf.cost.step import step_ledger
from partinf.foundation.errors import InvalidInput
from partinf.foundation.limits import NEVER
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model import kinds
from partinf.model.config import ModelConfig
from partinf.model.load import config_to_toml
from partinf.planner.choose import plan
from partinf.plans import Plan
from partinf.workload import DType, Workload

MODEL = ModelConfig("small", 12, 1024, 4096, 16, 8, 64, 4096)
PATTERN = {"kinds": (kinds.Kind("local", 1024), kinds.Kind("global")), "pattern": ("local",) * 5 + ("global",)}
LAYOUT = make_layout({"x": "ffn"}, {"x": "heads"})


def ledger(model: ModelConfig, program: Program = TILED, **shape: int) -> Ledger:
    slice_ = parse_slice("v4:2x1x1", "x:2")
    pricing = Pricing(slice_, program=program)
    return step_ledger(StepSplit(model, LAYOUT, LAYOUT.decode, StepShape(**shape), pricing, DType.BF16, DType.BF16, Shares()))


def cores(found: Ledger) -> list[Entry]:
    return [entry for entry in found.entries if entry.kind is EntryKind.ATTENTION]


DECODE = {"decode_rows": 8, "decode_context": 32768}
CHUNK = {"prefill_tokens": 2048, "prefill_slots": 1, "prefill_context": 30720}


def test_a_decode_step_reads_the_windows_of_layers_that_have_one() -> None:
    whole, windowed = ledger(MODEL, **DECODE), ledger(dataclasses.replace(MODEL, **PATTERN), **DECODE)
    assert {entry.count for entry in cores(windowed)} == {10, 2}
    assert windowed.kv_bytes == whole.kv_bytes * (2 + 10 * 1024 / 32768) / 12
    rest = [[entry for entry in one.entries if entry.kind is not EntryKind.ATTENTION] for one in (whole, windowed)]
    assert rest[0] == rest[1]


def test_a_chunk_attends_to_little_more_than_its_windows() -> None:
    whole, windowed = ledger(MODEL, **CHUNK), ledger(dataclasses.replace(MODEL, **PATTERN), **CHUNK)
    local, everywhere = sorted(cores(windowed), key=lambda entry: entry.flops)
    assert (local.count, everywhere.count) == (10, 2)
    assert local.flops * 30720 < everywhere.flops * 1024 * 1.01
    assert local.flops + local.padding_flops < 0.07 * (everywhere.flops + everywhere.padding_flops)
    assert windowed.seconds < whole.seconds


@pytest.mark.parametrize("shape", [DECODE, CHUNK])
def test_a_program_that_masks_saves_nothing(shape: dict[str, int]) -> None:
    assert ledger(dataclasses.replace(MODEL, **PATTERN), PLAIN, **shape) == ledger(MODEL, PLAIN, **shape)


@pytest.mark.parametrize("shape", [DECODE, CHUNK])
def test_a_window_that_holds_all_costs_what_none_does(shape: dict[str, int]) -> None:
    wide = ledger(dataclasses.replace(MODEL, window=32768), **shape)
    assert wide.seconds == ledger(MODEL, **shape).seconds
    assert wide.flops == ledger(MODEL, **shape).flops


def test_keys_that_a_prompt_sees_are_those_that_one_counts() -> None:
    rng = random.Random(0)
    for _ in range(200):
        own, context, window = rng.randint(1, 60), rng.randint(0, 60), rng.choice((rng.randint(1, 90), NEVER))
        counted = sum(min(context + place, window) for place in range(1, own + 1)) / own
        assert _seen(own, context, window) == pytest.approx(counted)


def test_stages_hold_whole_periods() -> None:
    model = dataclasses.replace(MODEL, **PATTERN)
    staged = make_layout({"x": "stage"}, {"x": "none"})
    assert Plan(model, parse_slice("cpu:2"), staged).num_stages == 2
    with pytest.raises(InvalidInput, match="12 do not split into 4 stages with the same kinds of layers: its kinds repeat after 6 layers"):
        Plan(model, parse_slice("cpu:4"), staged)
    with pytest.raises(InvalidInput, match="do not split into 2 stages .*: 2 of its layers stand outside the period"):
        Plan(dataclasses.replace(model, num_layers=14), parse_slice("cpu:2"), staged)


def test_a_search_passes_over_stages_that_would_differ() -> None:
    model = dataclasses.replace(MODEL, **PATTERN, num_layers=14)
    found = plan(model, parse_slice("v5e:4x4*2"), Workload(batch=32, context_len=2048, phase="decode"))
    assert found.num_stages == 1


def test_a_file_of_two_kinds_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cores are distinguished: those of its windows, and those that read all."""
    file = tmp_path / "mine.toml"
    file.write_text(config_to_toml(dataclasses.replace(MODEL, **PATTERN)))
    assert main(["plan", "--model", str(file), "--slice", "v5e:2x2", "--phase", "decode", "--batch", "64", "--context", "32768"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("decode core")]
    assert [line[3] for line in lines] == ["2", "10"]
