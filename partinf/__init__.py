"""partinf: plan, prove and run partitioned Transformer inference.

Importing this package imports nothing else (PEP 562): a name is loaded when it is first used, so that planning never waits for jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "AttentionRole": "layout",
    "Capacity": "buckets",
    "Chip": "hardware.slices",
    "DType": "workload",
    "Engine": "engine.engine",
    "InvalidInput": "foundation.errors",
    "Layout": "layout",
    "Model": "api",
    "ModelConfig": "model.config",
    "Objective": "workload",
    "Overloaded": "foundation.errors",
    "Phase": "layout",
    "Plan": "plans",
    "Proof": "proof",
    "RequestOutput": "engine.request",
    "Role": "layout",
    "SamplingParams": "engine.request",
    "Slice": "hardware.slices",
    "Workload": "workload",
    "load": "api",
    "load_model_config": "model.load",
    "make_layout": "layout.files",
    "parse_slice": "hardware.slices",
    "plan": "api",
    "prove": "proof",
    "with_capacity": "buckets",
}

if TYPE_CHECKING:
    from partinf.api import Model, load, plan
    from partinf.buckets import Capacity, with_capacity
    from partinf.engine.engine import Engine
    from partinf.engine.request import RequestOutput, SamplingParams
    from partinf.foundation.errors import InvalidInput, Overloaded
    from partinf.hardware.chips import Chip
    from partinf.hardware.slices import Slice, parse_slice
    from partinf.layout import AttentionRole, Layout, Phase, Role
    from partinf.layout.files import make_layout
    from partinf.model.config import ModelConfig
    from partinf.model.load import load_model_config
    from partinf.plans import Plan
    from partinf.proof import Proof, prove
    from partinf.workload import DType, Objective, Workload

__all__ = [
    "AttentionRole",
    "Capacity",
    "Chip",
    "DType",
    "Engine",
    "InvalidInput",
    "Layout",
    "Model",
    "ModelConfig",
    "Objective",
    "Overloaded",
    "Phase",
    "Plan",
    "Proof",
    "RequestOutput",
    "Role",
    "SamplingParams",
    "Slice",
    "Workload",
    "load",
    "load_model_config",
    "make_layout",
    "parse_slice",
    "plan",
    "prove",
    "with_capacity",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'partinf' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"partinf.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
