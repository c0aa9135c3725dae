"""What the cost model takes from compiled programs: products by rows, types and heads, exchanges that nothing waits for, small passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.planner_and_proof import measure
from experiments.planner_and_proof.steps import STEPS, planned
from experiments.planner_regret import table as regret
from experiments.results import place, read
from partinf.buckets import split_of
from partinf.cost.calibration import calibration_for
from partinf.cost.items import NEW_TO_CACHE, PREFILL, SMALL, W_IN, W_O, W_OUT, W_Q, Item
from partinf.cost.ledger import Entry, Op, Part
from partinf.cost.pricing import Pricing
from partinf.cost.program import TILED
from partinf.cost.step import step_ledger
from partinf.hardware.chips import chips
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Bucket, Plan
from partinf.workload import DType

STEP = {step.name: step for step in STEPS}
PROMPT = Bucket(prefill_tokens=8192, prefill_slots=1)


def entries(plan: Plan, bucket: Bucket, **changed: object) -> dict[Item, list[Entry]]:
    """Of a step in a program with changed fields, by what they are."""
    pricing = Pricing(plan.slice, calibration_for(plan.slice.chip), program=replace(TILED, **changed))  # type: ignore[arg-type]
    found: dict[Item, list[Entry]] = {}
    for entry in step_ledger(split_of(plan, bucket, pricing)).entries:
        found.setdefault(entry.item, []).append(entry)
    return found


def copies(model: str, slice_: str) -> Plan:
    """Weights copied over all axes, prompts over heads: tokens are exchanged for heads and back."""
    where = parse_slice(slice_)
    axes = list(where.axis_sizes)
    return Plan(load_model_config(model), where, make_layout(dict.fromkeys(axes, "replica"), dict.fromkeys(axes, "heads")))


def test_a_product_of_few_rows_waits_for_its_weights_to_pass_into_the_matrix_unit() -> None:
    by_chip = {name: calibration_for(chips()[name]) for name in ("v5e", "v6e", "tpu7x")}
    assert by_chip["v5e"].slowed(1) == 40
    assert by_chip["v6e"].slowed(1) > 100
    assert by_chip["tpu7x"].slowed(8192) == pytest.approx(1, abs=0.05)
    assert 1.3 < by_chip["tpu7x"].slowed(512) < 1.5


@pytest.mark.parametrize(("weights", "share"), [(DType.BF16, "streamed_share"), (DType.INT8, "streamed_int8_share")])
def test_weights_that_are_not_read_ahead_come_at_the_rate_of_their_type(weights: DType, share: str) -> None:
    where = parse_slice("v5p:2x2x1")
    constants, size = calibration_for(where.chip), 100e6
    pricing = Pricing(where, constants, program=replace(TILED, unrolled=True)).of_types(weights, DType.BF16)
    entry = pricing.product(W_IN.product, Part.FFN, 1, 1.0, 1.0, size, shape=(64, 1, 1))
    assert entry.seconds == pytest.approx(size / (where.chip.hbm_bandwidth * getattr(constants, share)))
    assert not entry.early  # it reads them itself


@pytest.mark.parametrize(("slice_", "times"), [("v6e:2x2", 2), ("v5p:2x2x1", 1)])
def test_heads_narrower_than_the_matrix_unit_leave_the_rest_of_it_idle(slice_: str, times: int) -> None:
    """Of Qwen 3 8B W_Q and W_O are of one size, and its heads have 128 columns."""
    found = entries(copies("qwen-3-8b", slice_), PROMPT)
    (query,), (out,) = found[W_Q.product], found[W_O.product]
    assert query.seconds == pytest.approx(times * out.seconds)


def test_keys_and_values_are_exchanged_behind_the_product_of_queries() -> None:
    plan = copies("llama-3-8b", "v5p:2x2x1")
    found = entries(plan, PROMPT)
    (keys,), (queries,), (product,) = found[PREFILL.keys], found[PREFILL.queries], found[W_Q.product]
    assert keys.op is Op.ALL_TO_ALL
    assert keys.overlapped == min(keys.seconds, product.seconds) > 0
    assert not queries.overlapped
    assert not entries(plan, PROMPT, exchanges_overlap=False)[PREFILL.keys][0].overlapped
    on_gpus = entries(copies("llama-3-8b", "h100:4"), PROMPT)
    assert not on_gpus[PREFILL.keys][0].overlapped


def test_a_parallel_block_exchanges_heads_behind_its_feed_forward() -> None:
    found = entries(copies("palm-8b", "tpu7x:2x2x1"), PROMPT)
    moved = found[PREFILL.queries] + [one for one in found[PREFILL.keys] if one.op is Op.ALL_TO_ALL]
    assert sum(one.overlapped for one in moved) == pytest.approx(min(sum(one.seconds for one in moved), found[W_IN.product][0].seconds))
    assert found[PREFILL.back][0].overlapped == min(found[PREFILL.back][0].seconds, found[W_OUT.product][0].seconds) > 0


def test_what_goes_to_the_cache_runs_behind_the_core() -> None:
    found = entries(*planned(STEP["tpu7x 8k"]))
    (moved,), cores = found[NEW_TO_CACHE], found[PREFILL.core]
    assert moved.overlapped == pytest.approx(min(moved.seconds, sum(core.seconds for core in cores)))


def test_products_pass_over_a_residual_that_is_whole_on_its_device() -> None:
    whole, split = entries(copies("llama-3-8b", "v5p:2x2x1"), PROMPT), entries(*planned(STEP["v5p 8k"]))
    constants = calibration_for(chips()["v5p"])
    operations = TILED.small_operations * constants.layer_seconds
    assert whole[SMALL][0].seconds == pytest.approx(operations)
    elements = 2 * 8192 * 4096 // 4
    assert split[SMALL][0].seconds == pytest.approx(operations + elements * constants.element_seconds)


def test_heads_that_are_exchanged_are_passed_over_once_more() -> None:
    """Llama 3 8B on four chips: 8 heads of queries and two of keys and of values per device, and queries and results by group."""
    constants, row = calibration_for(chips()["v5p"]), 8192 * 128
    kept = entries(*planned(STEP["v5p 8k"]))[PREFILL.passes][0]
    exchanged = entries(copies("llama-3-8b", "v5p:2x2x1"), PROMPT)[PREFILL.passes][0]
    assert kept.seconds == pytest.approx((3 * 8 + 4) * row * constants.element_seconds)
    assert exchanged.seconds == pytest.approx((5 * 8 + 2 * 4) * row * constants.element_seconds)


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p", "tpu7x"])
def test_what_an_element_takes_is_the_mean_of_the_compiled_prompts(chip: str) -> None:
    rows = [row for row in read(measure.__file__)["rows"] if row["step"].startswith(chip) and "elements" in row]
    each = [row["passing"] / row["elements"] for row in rows]
    assert len(each) == 2
    assert calibration_for(chips()[chip]).element_seconds == pytest.approx(sum(each) / 2, rel=0.06)


def test_the_pages_show_what_the_commands_found() -> None:
    rows, judged = read(measure.__file__)["rows"], read(regret.__file__, "compiled.json")
    page, other = (Path(one.__file__).with_name("README.md").read_text() for one in (measure, regret))
    assert measure.table(rows) in page
    assert measure.elements(rows) in page
    assert regret.compiled(judged["rows"]) in other
    assert regret.outcome(judged["summary"]) in other
    assert regret.of_products(read(regret.__file__, "products.json")) in other


def test_a_table_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("above\n<!-- figures -->\nold\n<!-- end -->\nbelow\n")
    for _ in range(2):
        place(str(tmp_path / "measure.py"), "new", "figures")
        assert page.read_text() == "above\n<!-- figures -->\nnew\n<!-- end -->\nbelow\n"
    with pytest.raises(ValueError, match="no line '<!-- table -->'"):
        place(str(tmp_path / "measure.py"), "new")
