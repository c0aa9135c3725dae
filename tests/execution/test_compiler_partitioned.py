"""The same forward with the compiler's own collectives: an independent check of what the partitioned step computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from partinf.layout.files import make_layout
from partinf.model.config import Activation, Block, ModelConfig
from partinf.transformer.compiler_partitioned import compile_partitioned
from partinf.workload import DType
from tests.execution.harness import MODEL, TOLERANCE, largest_error, make_plan

TWO_D = {"x": "embed", "y": "ffn", "z": "ffn"}
PALM = replace(MODEL, name="palm", block=Block.PARALLEL, num_kv_heads=1, activation=Activation.SILU)


@pytest.mark.parametrize(
    ("model", "dtype", "unrolled", "decode", "prefill"),
    [
        (MODEL, DType.F32, True, dict.fromkeys("xyz", "batch"), dict.fromkeys("xyz", "heads")),
        (MODEL, DType.INT8, False, dict.fromkeys("xyz", "heads"), dict.fromkeys("xyz", "batch")),
        (PALM, DType.F32, False, dict.fromkeys("xyz", "batch"), {"x": "none", "y": "heads", "z": "heads"}),
    ],
)
def test_the_compiler_partitions_the_same_forward(
    model: ModelConfig, dtype: DType, unrolled: bool, decode: dict[str, str], prefill: dict[str, str]
) -> None:
    plan = make_plan("x:2,y:2,z:2", make_layout(TWO_D, decode, prefill), model, dtype=dtype)
    assert largest_error(plan, unrolled=unrolled, compiler=compile_partitioned) < TOLERANCE[dtype.value]
