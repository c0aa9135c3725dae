"""Which axes split what of a mixture of experts, by the batch: experts, tensors, or copies of the dense weights next to them.

    python -m experiments.experts_by_batch.measure        # a minute, writes results.json
    python -m experiments.experts_by_batch.table          # writes README.md from it

For each model on its slice: the best layout of a decode step by the batch, the same with every axis of experts' matrices splitting experts,
and their d_ff; a batch-parallel attention with both dispatches; and what skewed routers cost the best layout. Then the published steps
of Qwen 3 30B-A3B and a traced layer of DeepSeek R1 (`r1`). Nothing is run.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

from experiments.experts_by_batch import r1
from experiments.results import write
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import Slice, parse_slice
from partinf.layout import Layout, experts_name
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.planner.evaluate import FEW_ROWS
from partinf.planner.question import Question
from partinf.planner.report import answer
from partinf.planner.results import Candidate
from partinf.planner.search import given
from partinf.plans import layout_offences
from partinf.workload import Workload

CASES = (("qwen-3-30b-a3b", "v6e:2x2"), ("gpt-oss-120b", "v6e:2x4"), ("mixtral-8x7b", "v5e:4x4"), ("qwen-3-235b-a22b", "v5e:8x8"))
BATCHES = (1, 4, 16, 64, 256, 1024)
CONTEXT = 2048
SKEWS = (1.01, 1.2)
# Qwen 3 30B-A3B, bfloat16, TP4 EP4 on v6e-4 by sglang-jax (nightly of 2026-10-05): ms between tokens of 32 and 96 requests of 4096 and 1024
# tokens. An engine's host and the prefills between are in it.
EXPERTS_PER_DEVICE = 128 // 4
PUBLISHED = {32: 13.98, 96: 25.90}
PROMPTS, TO_FIRST_TOKEN = (8, 4096), 999  # ms with eight prompts in flight


def everywhere(slice_: Slice, dense: str, attention: str, experts: str, dispatch: str = "gather") -> Layout:
    """Every axis with the same roles."""
    axes = slice_.axis_sizes
    return make_layout(
        dict.fromkeys(axes, dense), dict.fromkeys(axes, attention), experts=dict.fromkeys(axes, experts), decode_dispatch=dispatch
    )


def step(question: Question, slice_: Slice, layout: Layout) -> Candidate | None:
    """One layout; None where the model does not split so."""
    if layout_offences(question.model, slice_, layout):
        return None
    whole = replace(layout, decode=replace(layout.decode, whole=True))
    either = [layout, whole] if question.workload.batch <= FEW_ROWS else [layout]  # as the planner has it
    return min(given(question, slice_, [(one, 0) for one in either]), key=lambda candidate: candidate.score)


def ms(candidate: Candidate | None) -> float | None:
    return None if candidate is None else float(f"{candidate.main.step_seconds * 1e3:.4g}")


def row(model: ModelConfig, slice_: Slice, batch: int) -> dict[str, Any]:
    """What the best layout of a decode step is, and what others take."""
    question = Question(model, Workload(batch=batch, context_len=CONTEXT, phase="decode"))
    best = answer(question, slice_).best
    routed = next(entry.routed for entry in best.main.ledger.entries if entry.routed is not None)
    skewed = (step(replace(question, skew=skew), slice_, best.layout) for skew in SKEWS)
    return {
        "batch": batch,
        "best": best.name,
        "experts": experts_name(best.layout, slice_.axis_sizes),
        "fits": best.fits,
        "ms": ms(best),
        "hit": round(routed.hit, 1),
        "most_rows": round(routed.most_rows, 1),
        "all_experts": ms(step(question, slice_, everywhere(slice_, "ffn", "heads", "expert"))),
        "all_tensors": ms(step(question, slice_, everywhere(slice_, "ffn", "heads", "ffn"))),
        "copies_gathering": ms(step(question, slice_, everywhere(slice_, "replica", "batch", "expert"))),
        "copies_exchanging": ms(step(question, slice_, everywhere(slice_, "replica", "batch", "expert", "exchange"))),
        "skewed": dict(zip(map(str, SKEWS), map(ms, skewed), strict=True)),
    }


def floor(candidate: Candidate, bandwidth: float) -> float:
    """Milliseconds of reading at the stated bandwidth: keys and values, and all weights, of experts those that are hit in the mean."""
    read = candidate.main.ledger.kv_bytes
    for entry in candidate.main.ledger.entries:
        held = entry.weight_bytes * entry.count
        read += held if entry.routed is None else held * entry.routed.hit / EXPERTS_PER_DEVICE
    return float(f"{1e3 * read / bandwidth:.4g}")


def published() -> list[dict[str, Any]]:
    """Qwen 3 30B-A3B on v6e-4, in the program of serving engines: what was measured, TP4 EP4, and the planner's choice, by skew."""
    model, slice_ = load_model_config("qwen-3-30b-a3b"), parse_slice("v6e:2x2")
    found = []
    for batch, measured in PUBLISHED.items():
        question = Question(model, Workload(batch=batch, context_len=4096 + 512, phase="decode"))
        same = everywhere(slice_, "ffn", "heads", "expert")
        best = answer(question, slice_).best
        skews = {str(skew): replace(question, skew=skew) for skew in (0.0, *SKEWS)}
        floors = {skew: floor(given(question, slice_, [(same, 0)])[0], slice_.chip.hbm_bandwidth) for skew, question in skews.items()}
        found.append(
            {
                "batch": batch,
                "measured": measured,
                "tp4_ep4": {skew: ms(step(question, slice_, same)) for skew, question in skews.items()},
                "floor": floors,
                "planner": {skew: ms(step(question, slice_, best.layout)) for skew, question in skews.items()},
                "layout": best.name,
            }
        )
    return found


def prompts() -> dict[str, Any]:
    """The same model, prompts alone, all in one step; the floor is their FLOPs at the stated peak."""
    model, slice_ = load_model_config("qwen-3-30b-a3b"), parse_slice("v6e:2x2")
    batch, length = PROMPTS
    question = Question(model, Workload(batch=batch, input_len=length, output_len=1, phase="prefill"))
    best = answer(question, slice_).best
    same = given(question, slice_, [(everywhere(slice_, "ffn", "heads", "expert"), 0)])[0]
    least = 1e3 * same.main.ledger.flops / slice_.chip.peak_bf16
    return {"measured": TO_FIRST_TOKEN, "tp4_ep4": ms(same), "planner": ms(best), "floor": float(f"{least:.3g}"), "layout": best.name}


def main() -> None:
    tables: dict[str, Any] = {}
    for name, where in CASES:
        model, slice_ = load_model_config(name), parse_slice(where)
        try:
            tables[f"{name} on {where}"] = [row(model, slice_, batch) for batch in BATCHES]
        except InvalidInput as error:
            raise SystemExit(f"{name} on {where}: {error}") from None
    write(__file__, {"date": str(date.today()), "steps": tables, "published": published(), "prefill": prompts(), "r1": r1.rows()})


if __name__ == "__main__":
    main()
