"""What the planner says of our own steps, against what their compiled programs say: prompts tile by tile, decode, on four kinds of TPU."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from experiments.planner_and_proof import measure
from experiments.planner_and_proof.steps import STEPS, planned
from experiments.results import read
from partinf.buckets import split_of
from partinf.cost.calibration import calibration_for
from partinf.cost.items import DECODE, PREFILL
from partinf.cost.pricing import Pricing
from partinf.cost.program import TILED
from partinf.cost.step import step_ledger
from partinf.foundation.limits import NEVER
from partinf.hardware.platform import CPU, GPU, PLATFORMS, TPU, Tiles
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Bucket, Plan
from partinf.proof.proving import planned_ledger, schedule_of
from partinf.workload import DType
from tests.proof.test_walk import entry

ROWS = {row["step"]: row for row in read(measure.__file__)["rows"]}


def test_planner_and_proof_agree_on_twelve_steps() -> None:
    """The proofs are those that the experiment holds, the planner is today's."""
    errors = [abs(planned_ledger(*planned(step)).seconds / ROWS[step.name]["proof"] - 1) for step in STEPS]
    assert len(errors) == 12
    assert statistics.median(errors) <= 0.10
    assert max(errors) <= 0.25


def core(tokens: int, slots: int, context: int = 0, **changed: object) -> float:
    """Seconds of the core of prompts in one layer, on a v5e slice."""
    plan, _ = planned(next(step for step in STEPS if step.name == "v5e 512"))
    bucket = Bucket(prefill_tokens=tokens, prefill_slots=slots, prefill_pages=context // plan.cache.page_size)
    pricing = Pricing(plan.slice, calibration_for(plan.slice.chip), program=replace(TILED, **changed))  # type: ignore[arg-type]
    entries = step_ledger(split_of(plan, bucket, pricing)).entries
    return sum(entry.seconds for entry in entries if entry.item == PREFILL.core)


def test_a_long_prompt_takes_what_its_seen_tiles_take() -> None:
    long, twice = core(16384, 1), core(32768, 1)
    assert 3.5 < twice / long < 4  # half of a square, and the diagonal's tiles
    assert core(32768, 16) < twice / 3  # sixteen prompts see themselves alone, and every pair of tiles is visited
    assert core(4096, 1, context=4096) > 1.8 * core(4096, 1)  # earlier context is seen whole


def test_the_kernel_for_prompts_is_priced_at_half_of_the_peak_for_the_blocks_that_it_visits() -> None:
    plan, _ = planned(next(step for step in STEPS if step.name == "v5e 512"))
    heads, size, chip = plan.model.num_heads // 8, plan.model.head_dim, plan.slice.chip
    pairs = TPU.tiles.kernel_pairs(4096, 1, heads, NEVER)
    assert 4096**2 / 2 < pairs < 4096**2 / 1.6
    assert core(4096, 1) == pytest.approx(4 * pairs * heads * size / (chip.peak_bf16 / 2))


def test_where_the_kernel_does_not_fit_a_loop_over_tiles_is_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernel = core(4096, 1)
    monkeypatch.setitem(PLATFORMS, "tpu", replace(TPU, tiles=replace(TPU.tiles, fresh=False)))
    assert core(4096, 1) > 3 * core(4096, 1, tile_loop=False)  # the loop's own work is most of it
    assert core(4096, 1) > 3 * with_kernel
    assert not TPU.tiles.takes_prompts(8, 8, 64)
    assert not TPU.tiles.takes_prompts(128, 1, 128)
    assert TPU.tiles.takes_prompts(64, 1, 128)


def test_tiles_are_counted_as_the_loop_visits_them() -> None:
    tiles = Tiles(keys=64, prompt_keys=128, scores=1 << 14)
    assert tiles.queries(1) == 128
    assert tiles.count(512, 512, 1) == (4, 16)
    assert tiles.count(0, 0, 1) == (0, 0)
    assert tiles.seen_shares(512, 1, 1)[0] == (1 + 2 + 3 + 4) / 16
    assert replace(tiles, skip=False).seen_shares(512, 1, 1) == (1.0, 1.0)
    assert all(platform.tiles.count(100, 100, 8) == (1, 1) for platform in (CPU, GPU, TPU))


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p", "tpu7x"])
def test_tiles_of_every_chip_are_what_the_compiler_says(chip: str) -> None:
    """The constants are those of one compiled prompt; within a quarter they are those of the other too."""
    constants = calibration_for(planned(next(step for step in STEPS if step.slice.startswith(chip)))[0].slice.chip)
    found = [row for name, row in read(measure.__file__, "tiles.json").items() if name.startswith(chip)]
    mine = (constants.score_seconds, constants.tile_seconds, constants.query_tile_seconds)
    assert any(all(abs(a / b - 1) < 0.02 for a, b in zip(mine, one.values(), strict=True)) for one in found)


@pytest.mark.parametrize(("kv", "scales"), [(DType.BF16, 0), (DType.INT8, 2 * 4 * 128)])
def test_tokens_written_by_a_kernel_by_hand(kv: DType, scales: int) -> None:
    """Of keys and values a tile of 32 bytes by d_head, and a row of scales, of two heads and 16 rows; only where there is such a kernel."""
    plan = Plan(
        load_model_config("llama-3-8b"),
        parse_slice("v5e:4x4"),
        make_layout({"x": "ffn", "y": "ffn"}, {"x": "heads", "y": "batch"}),
        kv=kv,
    )
    (entry,) = (one for one in planned_ledger(plan, Bucket(64, 4)).entries if one.item == DECODE.write)
    moved = 2 * 16 * (2 * 2 * 32 * 128 + scales)
    assert (entry.activation_bytes, entry.count) == (moved, 32)
    assert entry.seconds == pytest.approx(2e-6 + 2 * moved / (0.867 * plan.slice.chip.hbm_bandwidth))
    on_gpus = replace(plan, slice=parse_slice("h100:4x4"))
    assert not [one for one in planned_ledger(on_gpus, Bucket(64, 4)).entries if one.item == DECODE.write]


def test_bytes_of_a_kernel_run_at_the_rate_of_a_transfer() -> None:
    """Plans take what a whole step reaches of HBM; of a compiled one the walk finds the gaps."""
    plan = Plan(
        load_model_config("llama-3-8b"), parse_slice("v6e:1x1"), make_layout({"x": "ffn", "y": "ffn"}, {"x": "heads", "y": "batch"})
    )
    bucket = Bucket(64, 128)
    text = entry('%paged_decode.1 = s8[10,1000]{1,0:S(1)} custom-call(%w, %here), custom_call_target="tpu_custom_call"')
    (kernel,) = schedule_of(plan, bucket, text).kernels.values()
    moved = 32 * 64 * 128 * plan.cache.page_size * 2 * 8 * 128 * 2  # keys and values of 8 heads in bfloat16, all layers
    assert kernel.seconds == pytest.approx(moved / (0.95 * plan.slice.chip.hbm_bandwidth), rel=0.01)
    (planned_core,) = (one for one in planned_ledger(plan, bucket).entries if one.item == DECODE.core)
    assert planned_core.seconds * planned_core.count / kernel.seconds == pytest.approx(0.95 / 0.83, rel=0.01)
