"""Partitioned experts = the reference, over roles for both kinds of matrices × meshes × routers, however tokens are routed."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest
from jax import lax

from partinf.hardware.platform import TPU, Platform
from partinf.layout.files import make_layout
from partinf.model.config import Block
from partinf.transformer import dispatch, params
from partinf.workload import DType
from tests.execution.harness import TOLERANCE, largest_error, make_plan
from tests.execution.mixtures import DENSE_FIRST, Mixed, all_mixed, largest_errors, model_of, sampled_mixed

SHARES = 100  # tests of all assignments


def too_large(mixed: Mixed, dtype: DType = DType.F32) -> dict[str, float]:
    """The errors that the type does not allow, by how tokens are routed."""
    return {name: error for name, error in largest_errors(mixed, dtype).items() if not error < TOLERANCE[dtype.value]}


def check(mixed: Mixed, dtype: DType = DType.F32) -> None:
    assert too_large(mixed, dtype) == {}


@pytest.mark.parametrize("mixed", sampled_mixed(4, seed=8), ids=str)
def test_sampled_assignments_equal_the_reference(mixed: Mixed) -> None:
    check(mixed)


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_every_assignment_equals_the_reference(share: int) -> None:
    assert {str(mixed): errors for mixed in all_mixed()[share::SHARES] if (errors := too_large(mixed))} == {}


REPLICATED_X = {"x": "replica", "y": "embed", "z": "ffn"}
ATTENTION = {"x": "batch", "y": "heads", "z": "heads"}
WHOLE_MODELS = {
    "dense first, gathering ahead": (
        "2x2x2",
        {"num_layers": 3, "ffn_dim": 32, **DENSE_FIRST},
        make_layout(
            REPLICATED_X,
            ATTENTION,
            decode_gather="y",
            decode_ahead=True,
            decode_gather_experts="y",
            experts={"x": "expert", "y": "ffn", "z": "expert"},
        ),
    ),
    "dense and mixed in turn, two stages": (
        "2x2x2",
        {"num_layers": 4, "ffn_dim": 32, "kinds": DENSE_FIRST["kinds"], "pattern": ("dense", "mixed")},
        make_layout(
            {"x": "stage", "y": "replica", "z": "ffn"},
            {"x": "none", "y": "batch", "z": "heads"},
            experts={"x": "stage", "y": "expert", "z": "ffn"},
        ),
    ),
    "parallel, two norms": (
        "2x2x2",
        {"block": Block.PARALLEL_TWO_NORMS},
        make_layout(REPLICATED_X, ATTENTION, experts={"x": "expert", "y": "expert", "z": "ffn"}),
    ),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if number else []) for number, name in enumerate(WHOLE_MODELS)])
def test_whole_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of several kinds of weights, stacked by kind; and one kind, unrolled. Experts' matrices lie turned in memory."""
    monkeypatch.setattr(Platform, "pins", lambda *_: True)
    monkeypatch.setattr(params, "lies_turned", lambda *_: True)
    mesh, other, layout = WHOLE_MODELS[name]
    model = model_of("not renormalised, shared with a gate", **other)
    assert largest_error(make_plan(mesh, layout, model), unrolled=not model.kinds) < TOLERANCE["f32"]


@pytest.mark.parametrize("dtype", [pytest.param(DType.BF16, marks=pytest.mark.slow), DType.INT8])
def test_narrow_types_stay_close(dtype: DType) -> None:
    gathered = Mixed(
        "2x2x2",
        (("replica", False), ("ffn", True), ("embed", False)),
        (("expert", False), ("ffn", True), ("embed", False)),
        "of the chosen, with biases",
        False,
    )
    check(gathered, dtype)


EXCHANGED = (
    Mixed(
        "2x2x2",
        (("replica", False), ("ffn", True), ("embed", False)),
        (("expert", False), ("embed", False), ("expert", False)),
        "in groups, shared",
        True,
        "exchange",
    ),
    Mixed(
        "4x2", (("replica", False), ("ffn", True)), (("expert", False), ("expert", False)), "of the chosen, with biases", False, "exchange"
    ),
)


@pytest.mark.parametrize("mixed", [EXCHANGED[0], pytest.param(EXCHANGED[1], marks=pytest.mark.slow)], ids=str)
def test_rows_that_are_sent_packed(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on TPUs, the exchange itself being made of a gather here."""
    calls = []

    def from_all(operand: Any, output: Any, *where: Any, axis_name: Any) -> Any:
        calls.append(axis_name)
        parts, starts, sizes, targets = (lax.all_gather(one, axis_name) for one in (operand, *where[:3]))
        me, places = lax.axis_index(axis_name), jnp.arange(output.shape[0])
        for sender in range(parts.shape[0]):
            within = places - targets[sender, me]
            found = parts[sender].at[starts[sender, me] + within].get(mode="clip")
            output = jnp.where(((within >= 0) & (within < sizes[sender, me]))[:, None], found, output)
        return output

    monkeypatch.setattr(lax, "ragged_all_to_all", from_all)
    monkeypatch.setattr(dispatch, "made_for", lambda routes: TPU)
    check(mixed)
    assert len(calls) >= 2  # there and back
