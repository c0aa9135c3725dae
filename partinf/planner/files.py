"""Plans as layout files: what `partinf plan --save` writes and everything that runs a model reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from partinf.foundation.documents import Table
from partinf.foundation.errors import collect, raise_offences
from partinf.foundation.limits import MAX_BATCH, MAX_LEN, NEVER
from partinf.hardware.hardware_file import slice_of
from partinf.layout.files import layout_from_toml, layout_to_toml
from partinf.model.load import load_model_config
from partinf.plans import Plan
from partinf.workload import DType, Objective, Workload


def plan_to_toml(plan: Plan, workload: Workload, description: str = "", model: str = "") -> str:
    """A layout file: roles, the model and slice they were chosen for, the workload, and the predicted figures.

    Args:
        model: how the model was named, where that is a path and not the name of a shipped one.
    """
    head: dict[str, Any] = {
        "description": description or plan.note,
        "model": model or plan.model.name,
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
    return saved_plan(text, where)[0]


@dataclass(frozen=True)
class SavedPlan:
    """A layout file that names its model and slice.

    Attributes:
        text: of the file. workload: that the plan was chosen for. model: by which name or path it was planned.
    """

    text: str
    plan: Plan
    workload: Workload
    model: str

    @classmethod
    def of(cls, text: str, where: str, model: str | None = None, hardware: str | None = None) -> SavedPlan:
        """As `saved_plan`."""
        plan, workload = saved_plan(text, where, model, hardware)
        return cls(text, plan, workload, layout_from_toml(text, where)[1]["model"])


def saved_plan(text: str, where: str, model: str | None = None, hardware: str | None = None) -> tuple[Plan, Workload]:
    """The same, and the workload that the plan was chosen for: one request of one token where the file names none.

    Args:
        model: where the model lies here, instead of where it lay when the plan was made. hardware: a file of `partinf calibrate`.

    Raises:
        InvalidInput: as `plan_from_toml`, or a workload that is none.
    """
    layout, rest = layout_from_toml(text, where)
    offences = [f"{where}: '{key}' is missing; a plan names its model and slice" for key in ("model", "slice") if key not in rest]
    raise_offences(offences)
    config = collect(offences, lambda: load_model_config(rest["model"] if model is None else model))
    slice_ = collect(offences, lambda: slice_of(rest["slice"], rest.get("mesh"), hardware))
    weights, kv = DType(rest.get("weights", "bf16")), DType(rest.get("kv", "bf16"))
    workload = _chosen_for(Table(rest.get("chosen_for", {}), f"{where} [chosen_for]", offences), weights, kv)
    raise_offences(offences)
    assert config is not None
    assert slice_ is not None
    assert workload is not None
    switch, padded = rest.get("prefill_from_tokens", NEVER), rest.get("padded_heads", 0)
    note = rest.get("description", "")
    return Plan(config, slice_, layout, weights, kv, prefill_from_tokens=switch, padded_heads=padded, note=note), workload


def _chosen_for(table: Table, weights: DType, kv: DType) -> Workload | None:
    fields = {
        "batch": table.whole("batch", default=1, low=1, high=MAX_BATCH),
        "input_len": table.whole("input", default=1, high=MAX_LEN),
        "output_len": table.whole("output", default=0, high=MAX_LEN),
        "context_len": table.whole("context", default=None, high=MAX_LEN),
        "prefill_batch": table.whole("prefill_batch", default=None, low=1, high=MAX_BATCH),
        "objective": table.choice("objective", Objective, default=Objective.LATENCY),
        "phase": table.text("phase", default=None),
    }
    table.refuse_unknown()
    found: list[str] = []
    workload = collect(found, lambda: Workload(**fields, weights=weights, kv=kv))
    table.offences += [f"{table.where}: {offence}" for offence in found]
    return workload


def _inline(table: dict[str, Any]) -> str:
    return "{ " + ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()) + " }"
