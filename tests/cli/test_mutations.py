"""Whatever a file holds and whatever a flag says, the command line ends with 0 or 2, soon, without a traceback and without much memory."""

from __future__ import annotations

import math
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from partinf.buckets import Capacity, with_capacity
from partinf.foundation.errors import InvalidInput
from partinf.foundation.limits import MAX_LEN
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Plan
from partinf.simulation.sizing import Sizing
from partinf.workload import Workload
from tests.cli.mutations import kinds, mutate_command_lines, mutate_files, quiet
from tests.engine.support import ROOMY

_GIB_IN_KIB = 1 << 20


def test_the_files_are_right_before_they_are_mutated(tmp_path: Path) -> None:
    for kind in kinds():
        (tmp_path / kind.name).write_text(kind.text)
        assert kind.read(tmp_path / kind.name) == 0, kind.name


def test_mutated_files(tmp_path: Path) -> None:
    tally = mutate_files(1, 150, tmp_path)
    assert tally.codes[2] > 50
    assert tally.seconds < 30, tally.slowest


def test_command_lines_at_the_ends_of_ranges(tmp_path: Path) -> None:
    tally = mutate_command_lines(1, 30, tmp_path)
    assert tally.codes[2] > 12
    assert tally.seconds < 30, tally.slowest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv-pages", "1000000000"], "--kv-pages 1000000000: a whole number is needed, from 0 to 8,388,608"),
        (["--host-memory", "1e18"], "--host-memory 1e18: a number is needed"),
        (["--arrivals", "gamma:1:1e-200"], "coefficient of variation = 1e-200; it must be at least 0.001"),
        (["--requests", "²"], "--requests ²: a whole number is needed"),
        (["--max-batch", "1000000000"], "from 0 to 1,048,576"),
        (["--max-len", "9223372036854775808"], "from 0 to 16,777,216"),
        (["--slice", "cpu:100000000"], "100,000,000 devices; at most 1,048,576"),
        (["--slice", "v5e:99999x99999"], "9,999,800,001 devices"),
        (["--mesh", "x:1000000000,y:1"], "must multiply to"),
    ],
)
def test_numbers_that_are_too_large(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    from partinf.cli import main

    assert main(["simulate", "--model", "llama-3-8b", "--slice", "v5e:2x2", "--requests", "2", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_library_holds_sizes_to_the_same_ranges() -> None:
    huge = 1_000_000_000
    for make in (
        lambda: Sizing(kv_pages=huge),
        lambda: Sizing(host_bytes=math.inf),
        lambda: Sizing(max_rows=2.0),  # type: ignore[arg-type]
        lambda: Workload(batch=huge, input_len=1),
        lambda: Workload(batch=1, input_len=MAX_LEN, output_len=1),
        lambda: Workload(batch=1, input_len=1, max_latency=math.nan),
        lambda: Workload(batch=1, input_len=1, output_len=1, arrival_rate=1e-300),
        lambda: replace(ROOMY, num_slots=huge),
        lambda: replace(ROOMY, pages_per_shard=huge),
        lambda: replace(ROOMY, num_host_pages=huge),
        lambda: parse_slice(f"cpu:{huge}"),
        lambda: parse_slice("v4:4x4x4", f"x:{huge},y:{huge},z:{huge}"),
    ):
        with pytest.raises(InvalidInput):
            make()
    plan = Plan(load_model_config("demo"), parse_slice("cpu:1"), make_layout({"x": "ffn"}, {"x": "heads"}))
    for capacity in (
        Capacity(max_rows=huge),
        Capacity(prefill_tokens=huge),
        Capacity(page_size=huge),
        Capacity(max_rows=1 << 20, page_size=1),
    ):
        with pytest.raises(InvalidInput):
            with_capacity(plan, capacity)


@pytest.mark.slow
def test_thousands_of_them(tmp_path: Path) -> None:
    quiet(["plan", "--model", "demo", "--slice", "cpu:1", "--input", "1"])  # what an idle process has loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for tally in (mutate_files(2, 2940, tmp_path), mutate_command_lines(2, 1000, tmp_path)):
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / _GIB_IN_KIB
        print(f"exit codes {tally.codes}; longest {tally.seconds:.1f} s ({tally.slowest}); {more:.2f} GiB above an idle process")
        assert tally.seconds < 30, tally.slowest
        assert more < 1
