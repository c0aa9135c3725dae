"""Plans as layout files: what `partinf plan --save` writes and everything that runs a model reads."""

from __future__ import annotations

import json
from typing import Any

from partinf.errors import raise_offences
from partinf.hardware.slices import parse_slice
from partinf.layout import layout_from_toml, layout_to_toml
from partinf.model.config import load_model_config
from partinf.plans import Plan
from partinf.workload import DType, Workload


def plan_to_toml(plan: Plan, workload: Workload, description: str = "") -> str:
    """A layout file: roles, the model and slice they were chosen for, the workload, and the predicted figures."""
    head: dict[str, Any] = {
        "description": description or plan.note,
        "model": plan.model.name,
        "slice": plan.slice.name,
        "mesh": plan.slice.mesh,
        "weights": plan.weights.value,
        "kv": plan.kv.value,
        "prefill_from_tokens": plan.prefill_from_tokens,
    }
    if plan.padded_heads:
        head["padded_heads"] = plan.padded_heads
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    chosen = {
        "phase": workload.phase,
        "batch": workload.batch,
        "prefill_batch": workload.prefill_batch,
        "input": workload.input_len,
        "output": workload.output_len,
        "context": workload.decode_context,
        "objective": workload.objective.value,
    }
    lines.append(f"chosen_for = {_inline({key: value for key, value in chosen.items() if value is not None})}")
    predicted = {f"{label}_seconds": float(f"{ledger.seconds:.4g}") for label, ledger in plan.predicted}
    lines.append(f"predicted = {_inline(predicted)}")
    return layout_to_toml(plan.layout, "\n".join(lines) + "\n")


def plan_from_toml(text: str, where: str) -> Plan:
    """Read a layout file that names its model and slice.

    Raises:
        InvalidInput: what `layout_from_toml` refuses, an unknown model or slice, or a layout that cannot hold the model.
    """
    layout, rest = layout_from_toml(text, where)
    raise_offences(f"{where}: '{key}' is missing; a plan names its model and slice" for key in ("model", "slice") if key not in rest)
    slice_ = parse_slice(rest["slice"], rest.get("mesh"))
    return Plan(
        load_model_config(rest["model"]),
        slice_,
        layout,
        DType(rest.get("weights", "bf16")),
        DType(rest.get("kv", "bf16")),
        prefill_from_tokens=rest.get("prefill_from_tokens", 1 << 30),
        padded_heads=rest.get("padded_heads", 0),
    )


def _inline(table: dict[str, Any]) -> str:
    return "{ " + ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()) + " }"
