"""The closed form and the traced program agree exactly for mixtures of experts, under every role that an axis can have for them."""

from __future__ import annotations

import dataclasses

import pytest

from partinf.model.config import Block, ModelConfig
from partinf.plans import Bucket
from partinf.transformer import experts
from partinf.transformer.account import trace_account
from partinf.workload import DType
from tests.execution.mixtures import DENSE_FIRST, MIXTURES, Mixed, all_mixed, model_of, sampled_mixed
from tests.execution.test_two_accounts import check, ledger_of, make_plan, traced

DECODE, MIXED = Bucket(16, 8), Bucket(16, 16, 64, 16, 8)
SHARES = 40  # tests of all assignments
EXCHANGED = Mixed("2x2x2", (("replica", False), ("embed", True), ("ffn", False)), (("expert", False),) * 3, "plain", False, "exchange")


def check_mixed(mixed: Mixed, bucket: Bucket, model: ModelConfig | None = None, weights: DType = DType.BF16) -> None:
    plan = make_plan(mixed.mesh, mixed.layout(), model=model or model_of(mixed.mixture))
    check(dataclasses.replace(plan, weights=weights), bucket)


@pytest.mark.parametrize("mixed", sampled_mixed(5, seed=21), ids=str)
def test_sampled_assignments(mixed: Mixed) -> None:
    check_mixed(mixed, MIXED)


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_every_assignment(share: int) -> None:
    for mixed in all_mixed(three_axes=9)[share::SHARES]:
        try:
            check_mixed(mixed, MIXED)
        except AssertionError as unequal:
            raise AssertionError(str(mixed)) from unequal


@pytest.mark.parametrize("mixed", sampled_mixed(2, seed=8), ids=str)
def test_int8_weights(mixed: Mixed) -> None:
    check_mixed(mixed, DECODE, weights=DType.INT8)


def test_dense_layers_first() -> None:
    (mixed,) = sampled_mixed(1, seed=5)
    check_mixed(mixed, DECODE, model_of(mixed.mixture, **{"num_layers": 3, "ffn_dim": 128} | DENSE_FIRST))


@pytest.mark.parametrize("block", [Block.PARALLEL, Block.PARALLEL_TWO_NORMS])
def test_experts_of_a_parallel_block(block: Block) -> None:
    joined = Mixed("4x2", (("replica", False), ("ffn", False)), (("replica", False), ("ffn", False)), "in groups, shared", True)
    for mixed in (joined, dataclasses.replace(EXCHANGED, mixture="in groups, shared")):
        check_mixed(mixed, DECODE, model_of(mixed.mixture, block=block))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_mixture(mixture: str) -> None:
    check_mixed(dataclasses.replace(EXCHANGED, mixture=mixture), DECODE)


def test_a_movement_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dataclasses.replace(make_plan(EXCHANGED.mesh, EXCHANGED.layout(), model=model_of("plain")), buckets=(DECODE,))
    original = experts.move
    monkeypatch.setattr(
        experts, "move", lambda x, f, s, t: original(original(original(x, f, s, t), f, t, s) if not s.unreduced else x, f, s, t)
    )
    assert traced(trace_account(plan, DECODE)) != ledger_of(plan, DECODE)[0]
