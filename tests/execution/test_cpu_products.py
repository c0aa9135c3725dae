"""Every form of a product that a machine may choose against numpy, and how the choice is made, kept and adopted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf import api
from partinf.hardware.platform import CPU, Form
from partinf.plans import Bucket
from partinf.transformer.batch import empty_batch
from partinf.transformer.kernels import choices, products, turns
from partinf.transformer.kernels import cpu as cpu_kernels
from partinf.transformer.kernels.choices import Choices
from partinf.transformer.kernels.turns import Measured, Times
from partinf.transformer.linear import dot, live_rows, live_tokens
from partinf.transformer.routes import Routes
from partinf.workload import Workload

needs_kernels = pytest.mark.skipif("not cpu_kernels.available()", reason="no C++ compiler")
TYPES = {"f32": (jnp.float32, jnp.float32), "bf16": (jnp.bfloat16, jnp.bfloat16), "int8": (jnp.int8, jnp.bfloat16)}
EVERY = [(kind, form) for kind in TYPES for form in Form if form in products._FORMS[kind]]


@pytest.fixture(autouse=True)
def choices_of_the_process() -> Iterator[None]:
    before = choices.current()
    yield
    choices.adopt(before)


def arrays(kind: str, rows: int, inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(rows + inputs + outputs)
    dtype, act = TYPES[kind]
    weights = rng.integers(-128, 128, (outputs, inputs)) if kind == "int8" else rng.standard_normal((outputs, inputs))
    return jnp.asarray(rng.standard_normal((rows, inputs)), act), jnp.asarray(weights, dtype)


def exact(x: jax.Array, weights: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(weights, np.float64).T


def skip_without(kind: str, form: Form) -> None:
    if form not in products.forms(kind):
        pytest.skip("this machine has no such form")


@needs_kernels
@pytest.mark.parametrize(("kind", "form"), EVERY)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 100), (1312, 36)])  # what fills no block of outputs, and no whole depth of words
def test_every_form_is_the_product(kind: str, form: Form, inputs: int, outputs: int) -> None:
    skip_without(kind, form)
    for rows in (1, 3, 16, 41, 70):
        x, weights = arrays(kind, rows, inputs, outputs)
        want = exact(x, weights)
        got = np.asarray(products.made(form, x, weights), np.float64)
        # As float32 adds: an error of the sum of magnitudes, whatever the order.
        bound = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(weights, np.float64)).T
        assert (np.abs(got - want) <= 2**-20 * bound).all()
        narrow = products.made(form, x, weights, dtype=jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(narrow), np.asarray(jnp.asarray(got, jnp.float32).astype(jnp.bfloat16)))


@needs_kernels
@pytest.mark.parametrize(("kind", "form"), [each for each in EVERY if each[1] not in (Form.XLA, Form.WIDENED)])
def test_rows_that_hold_nothing_come_out_as_zeros_and_reach_no_other(kind: str, form: Form) -> None:
    skip_without(kind, form)
    x, weights = arrays(kind, 37, 64, 12)
    live = np.random.default_rng(3).random(37) < 0.6
    spoilt = jnp.where(live[:, None], x, jnp.nan)
    got = np.asarray(products.made(form, spoilt, weights, jnp.asarray(live)))
    assert (got[~live] == 0).all()
    np.testing.assert_array_equal(got[live], np.asarray(products.made(form, x[live], weights)))
    assert (np.asarray(products.made(form, x, weights, jnp.zeros(37, bool), jnp.bfloat16)) == 0).all()
    with pytest.raises(ValueError, match=r"\(36,\).*\(37, 64\)"):
        products.made(form, x, weights, jnp.ones(36, bool))


@needs_kernels
@pytest.mark.parametrize(("kind", "form"), EVERY)
def test_what_is_not_finite_stays_in_its_row_and_column(kind: str, form: Form) -> None:
    skip_without(kind, form)
    x, weights = arrays(kind, 19, 64, 12)
    x = x.at[4, 5].set(jnp.nan).at[7, 0].set(jnp.inf)
    spoilt = np.zeros((19, 12), bool)
    spoilt[[4, 7]] = True
    if kind != "int8":
        weights = weights.at[9, 33].set(jnp.nan)
        spoilt[:, 9] = True
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(~np.isfinite(np.asarray(products.made(form, x, weights, dtype=dtype), np.float32)), spoilt)


def test_a_form_takes_certain_sizes_and_types() -> None:
    x, weights = arrays("bf16", 2, 48, 12)
    assert products.fits(Form.PANELS, x, weights)
    assert not products.fits(Form.TILES, x, weights)
    assert not products.fits(Form.PANELS, x, weights[:6])
    assert not products.fits(Form.ROWS, x[:, :24], weights[:, :24])
    assert products.fits(Form.XLA, x[:, :24], weights[:6, :24])
    assert products.kind_of(x, weights) == "bf16"
    assert products.kind_of(x.astype(jnp.float32), weights) is None  # pairs are of bfloat16 on both sides


@needs_kernels
@pytest.mark.parametrize("kind", TYPES)
def test_a_product_of_a_step_takes_the_form_that_was_chosen(kind: str) -> None:
    x, weights = arrays(kind, 5, 64, 12)
    for form in products.forms(kind):
        choices.adopt(Choices(((kind, ((4, Form.XLA), (8, form))),)))
        traced = str(jax.make_jaxpr(lambda x, w: dot("te,fe->tf", x, w, jnp.float32, CPU))(x, weights))
        assert ("ffi_call" in traced) == (form not in (Form.XLA, Form.WIDENED))
        traced = str(jax.make_jaxpr(lambda x, w: dot("te,fe->tf", x, w, jnp.float32, CPU))(x[:4], weights))
        assert "ffi_call" not in traced
        without = jax.make_jaxpr(lambda x, w: dot("te,fe->tf", x, w, jnp.float32))(x, weights)
        assert "ffi_call" not in str(without)


def test_the_form_that_takes_least_is_chosen_between_the_rows_that_were_measured() -> None:
    few = Times("f32", Form.ROWS, ((1, 1.0), (4, 2.0), (16, 16.0)))
    many = Times("f32", Form.XLA, ((1, 4.0), (4, 4.0), (16, 4.0), (64, 8.0)))
    assert few.seconds(2) == pytest.approx(2**0.5)
    assert many.seconds(256) == 32.0
    assert few.seconds(32) == 32.0
    assert choices.chosen([few, many]) == ((6, Form.ROWS), (1536, Form.XLA))  # 4.0 and 1.1 · 4.0 are met between 6 and 8 rows
    late = Times("f32", Form.PANELS, ((16, 0.1),))
    assert choices.chosen([late, many]) == ((12, Form.XLA), (1536, Form.PANELS))


def test_a_kernel_that_is_nearly_as_fast_is_chosen_since_it_leaves_out_padding() -> None:
    times = [Times("f32", Form.XLA, ((1, 1.0), (4, 1.0))), Times("f32", Form.PANELS, ((1, 1.05), (4, 1.2)))]
    assert choices.chosen(times) == ((1, Form.PANELS), (1536, Form.XLA))


def test_a_step_says_which_rows_are_no_padding_where_a_device_has_all_of_them() -> None:
    one, copies = (api.plan("demo", f"cpu:{count}", Workload(4, 8, 8)) for count in (1, 2))
    bucket = Bucket(4, 1, prefill_tokens=4, prefill_slots=2)
    batch = empty_batch(bucket, one)
    batch.decode.position[:2], batch.prefill.owner[:3], batch.prefill.last[0] = 5, 0, 2
    routes = Routes(one, bucket)
    assert np.asarray(live_tokens(batch, routes)).tolist() == [True, True, False, False, True, True, True, False]
    assert np.asarray(live_rows(batch, routes)).tolist() == [True, True, False, False, True, False]
    assert live_tokens(batch, replace(routes, plain=True)) is None
    assert Routes(copies, bucket).ways(Routes(copies, bucket).tokens) == 2
    assert live_tokens(batch, Routes(copies, bucket)) is None
    assert live_rows(batch, Routes(copies, bucket)) is None


def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARTINF_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(cpu_kernels, "available", lambda: True)
    monkeypatch.setattr(products, "_has", lambda form: form is not Form.TILES)
    choices._current.clear()
    where = choices.path()
    assert where is not None
    return where


def test_what_was_measured_is_kept_and_measured_again_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, calls = kept(tmp_path, monkeypatch), []

    def measured() -> Measured:
        calls.append(1)
        form = Form.XLA if len(calls) == 1 else Form.PANELS
        return Measured(tuple(Times(kind, form, ((1, 1.0),)) for kind in TYPES))

    monkeypatch.setattr(choices, "take_turns", measured)
    first = choices.current()
    assert {form for _, lines in first.table for _, form in lines} == {Form.XLA}
    choices._current.clear()
    assert choices.current() == first
    assert len(calls) == 1
    again = choices.measure_again()
    assert again.table != first.table
    assert choices.current() == again
    for damaged in ("", "{}", where.read_text().replace("panels", "heaps"), where.read_text().replace("panels", "tiles")):
        where.write_text(damaged)
        choices._current.clear()
        assert choices.current() == again
    assert len(calls) == 6
    assert choices.from_json(choices.to_json(again)) == again


def test_times_that_do_not_settle_leave_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path, monkeypatch)
    monkeypatch.setattr(choices, "take_turns", lambda: Measured((Times("f32", Form.XLA, ((1, 1.0),)),), ("bf16", "int8")))
    found, table = choices.current(), choices.fallback()
    assert found.unsettled == ("bf16", "int8")
    assert dict(found.table) == dict(table.table) | {"f32": ((1536, Form.XLA),)}
    choices._current.clear()
    assert choices.current() == found  # and are not measured at every start


@pytest.mark.parametrize(("others", "warned"), [(0.05, 0), (0.6, 1)])
def test_what_was_measured_on_a_busy_machine_is_kept_with_a_warning(
    others: float, warned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, said = kept(tmp_path, monkeypatch), []
    times = tuple(Times(kind, Form.XLA, ((1, 1.0),)) for kind in TYPES)
    monkeypatch.setattr(choices, "take_turns", lambda: Measured(times, (), others))
    monkeypatch.setattr(choices.logging, "warning", lambda message, *values: said.append(message % values))
    assert choices.current().doubtful == bool(warned)
    assert len(said) == warned
    assert all("took 60% of the machine" in line for line in said)
    assert choices.from_json(where.read_text()).others == others


def test_nothing_is_measured_where_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTINF_CACHE_DIR", "off")
    monkeypatch.setattr(choices, "take_turns", lambda: pytest.fail("measured"))
    choices._current.clear()
    assert choices.current() == choices.fallback()
    monkeypatch.setattr(products, "_has", lambda form: False)
    assert {form for _, lines in choices.fallback().table for _, form in lines} <= {Form.XLA, Form.WIDENED}


def test_a_process_that_cannot_measure_settles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert turns.take_turns() == Measured(unsettled=tuple(TYPES))


@needs_kernels
def test_every_form_takes_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_SIZE", 64)
    monkeypatch.setattr(turns, "_BYTES", 1)
    monkeypatch.setattr(turns, "_SPREAD", math.inf)  # so small a product takes no steady time
    found = turns.measured(rows=(1, 32), seconds=1e9)
    times = found.times
    assert 0 <= found.others <= 1
    assert {(each.kind, each.form) for each in times} == {(kind, form) for kind in TYPES for form in products.forms(kind)}
    for each in times:
        assert [rows for rows, _ in each.measured] == ([1] if each.form in (Form.ROWS, Form.ROWS_OF_PAIRS) else [1, 32])
    json.dumps([each.measured for each in times])


@needs_kernels
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", [Form.PANELS, Form.TILES])
def test_rows_meet_the_matrix_of_their_expert(kind: str, form: Form) -> None:
    """Experts without rows are NaN, as rows beyond the sum of sizes are, and reach nothing."""
    if form is Form.TILES and not cpu_kernels.has_tiles():
        pytest.skip("this machine has no such form")
    sizes, inputs, outputs = [3, 0, 41, 1, 0, 17, 2], 96, 160
    rng, taken = np.random.default_rng(4), sum(sizes)
    dtype, act = TYPES[kind]
    x = jnp.asarray(rng.standard_normal((taken + 5, inputs)), act).at[taken:].set(jnp.nan)
    weights = rng.integers(-127, 128, (len(sizes), outputs, inputs)).astype(np.float32)
    if kind != "int8":
        weights[np.asarray(sizes) == 0] = np.nan
    stored = jnp.asarray(weights, dtype)
    got = np.asarray(cpu_kernels.grouped(x, stored, jnp.asarray(sizes), form)[:taken], np.float64)
    expert = np.repeat(np.arange(len(sizes)), sizes)
    rows, matrices = np.asarray(x, np.float64)[:taken], np.asarray(stored, np.float64)[expert]
    bound = np.einsum("te,tfe->tf", np.abs(rows), np.abs(matrices))
    assert (np.abs(got - np.einsum("te,tfe->tf", rows, matrices)) <= 2**-20 * bound).all()
