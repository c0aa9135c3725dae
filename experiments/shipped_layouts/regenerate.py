"""Writes `layouts/*.toml`: the layouts that have names, and what the planner chooses for the paper's configurations.

python -m experiments.shipped_layouts.regenerate            writes the files
python -m experiments.shipped_layouts.regenerate --check    fails when one of them has drifted
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from partinf.hardware.slices import parse_slice
from partinf.layout.files import layout_to_toml, make_layout
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.planner.files import plan_to_toml
from partinf.workload import DType, Workload

LAYOUTS = Path(__file__).resolve().parents[2] / "layouts"
TABLES = "as in tables 2 and 3 of Pope et al. (2023)"
SOURCE = "Pope et al. (2023), section 3.2 and figure 2"
STAGES_SOURCE = "Yu et al. (2022), section 4.1: inter-layer and intra-layer parallelism together"
STORED_2D = {"x": "embed", "y": "ffn", "z": "ffn"}
GATHERS = {"wg-x": ("x", "x"), "wg-xy": ("xy", "x and y"), "wg-xyz": ("xyz", "all axes")}


@dataclass(frozen=True)
class Chosen:
    """A configuration for which the planner chooses."""

    title: str
    model: str
    slice: str
    workload: Workload


def _serving(batch: int, prefill_batch: int, weights: DType) -> Workload:
    return Workload(batch, 1984, 64, weights=weights, prefill_batch=prefill_batch)


CHOSEN = {
    "palm-540b-low-latency": Chosen(f"PaLM 540B, low latency {TABLES}", "palm-540b", "v4:4x4x4", _serving(64, 1, DType.INT8)),
    "palm-540b-high-throughput": Chosen(f"PaLM 540B, high throughput {TABLES}", "palm-540b", "v4:4x4x4", _serving(512, 512, DType.BF16)),
    "palm-62b-low-latency": Chosen(f"PaLM 62B, low latency {TABLES}", "palm-62b", "v4:2x2x4", _serving(32, 1, DType.INT8)),
    "palm-62b-high-throughput-prefill": Chosen(
        f"PaLM 62B, high-throughput prefill {TABLES}", "palm-62b", "v4:2x4x4", Workload(512, 2048, phase="prefill")
    ),
    "palm-62b-high-throughput-decode": Chosen(
        f"PaLM 62B, high-throughput decode {TABLES}", "palm-62b", "v4:2x2x2", Workload(512, context_len=2048, phase="decode")
    ),
    "llama-3-70b-long-context": Chosen(
        "Llama 3 70B, decode of one request after 128 thousand tokens",
        "llama-3-70b",
        "v5e:4x4",
        Workload(1, context_len=131072, phase="decode", weights=DType.INT8),
    ),
}


def texts() -> dict[str, str]:
    """File name without suffix → text."""
    return {name: _named(name) for name in ("ws-1d", "ws-2d", *GATHERS, "long-context", "stages")} | {
        name: _chosen(chosen) for name, chosen in CHOSEN.items()
    }


def _named(name: str) -> str:
    batch, heads = dict.fromkeys("xyz", "batch"), dict.fromkeys("xyz", "heads")
    stationary = "attention over batch in decode, over heads in prefill"
    if name == "ws-1d":
        described = f"1D weight-stationary: all axes split d_ff and heads of the stored weights; {stationary}"
        layout = make_layout(dict.fromkeys("xyz", "ffn"), batch, heads)
    elif name == "stages":
        described = f"pipeline stages over x, each 1D weight-stationary over y and z; {stationary}"
        alone = {"x": "none"}
        layout = make_layout(dict.fromkeys("xyz", "ffn") | {"x": "stage"}, batch | alone, heads | alone)
    elif name == "ws-2d":
        described = f"2D weight-stationary: x splits d_model, y and z split d_ff; {stationary}"
        layout = make_layout(STORED_2D, batch, heads)
    elif name == "long-context":
        described = "1D weight-stationary; decode attends over heads on x and splits the context of each request over y and z"
        layout = make_layout(dict.fromkeys("xyz", "ffn"), {"x": "heads", "y": "sequence", "z": "sequence"}, heads)
    else:
        axes, words = GATHERS[name]
        kept = "decode keeps them stationary; attention over batch"
        described = f"stored as 2D weight-stationary; prefill gathers weights over {words}, {kept}"
        layout = make_layout(STORED_2D, batch, batch, prefill_gather=axes)
    sources = {"stages": STAGES_SOURCE, "long-context": None}
    source = sources.get(name, SOURCE)
    head = f"description = {json.dumps(described)}" + (f"\nsource = {json.dumps(source)}" if source else "")
    return layout_to_toml(layout, head)


def _chosen(chosen: Chosen) -> str:
    report = search(load_model_config(chosen.model), parse_slice(chosen.slice), chosen.workload)
    plan = report.plan
    described = f"{chosen.title}, the planner's choice. {plan.note}"
    return plan_to_toml(plan, chosen.workload, described)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    drifted = 0
    check = parser.parse_args().check
    for name, text in texts().items():
        file = LAYOUTS / f"{name}.toml"
        if check and (not file.is_file() or file.read_text() != text):
            drifted += 1
            print(f"{file.name} has drifted")
        elif not check:
            file.write_text(text)
    return 1 if drifted else 0


if __name__ == "__main__":
    sys.exit(main())
