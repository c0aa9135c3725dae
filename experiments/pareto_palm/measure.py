"""Latency against cost for PaLM 8B, 62B and 540B on TPU v4: the best layout of every batch and slice, and the front of each model.

python -m experiments.pareto_palm.measure     writes results.json next to this file
"""

from __future__ import annotations

from experiments.results import write
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.workload import DType, Workload

MODELS = ("palm-8b", "palm-62b", "palm-540b")
SLICES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
BATCHES = (1, 4, 16, 64, 256, 512, 1024)
CONTEXT = 2048


def workload(phase: str, batch: int, weights: DType) -> Workload:
    length = CONTEXT if phase == "prefill" else 0
    return Workload(batch, length, context_len=None if length else CONTEXT, phase=phase, weights=weights)


def point(name: str, shape: str, phase: str, batch: int, weights: DType) -> dict[str, object] | None:
    """The fastest layout that fits; None when none does."""
    best = search(load_model_config(name), parse_slice(f"v4:{shape}"), workload(phase, batch, weights)).best
    if not best.fits:
        return None
    return {
        "model": name,
        "phase": phase,
        "weights": weights.value,
        "slice": shape,
        "chips": best.num_chips,
        "batch": batch,
        "latency_s": best.main.step_seconds,
        "chip_ms_per_token": best.chip_ms_per_token,
        "mfu": best.main.mfu,
        "ffn": best.main.ffn,
        "attention": best.main.attention,
    }


def mark_front(points: list[dict[str, object]]) -> None:
    """Mark the points that no other point of the same model, phase and weights beats in both latency and cost."""
    points.sort(key=lambda p: (p["latency_s"], p["chip_ms_per_token"]))
    cheapest: dict[object, float] = {}
    for p in points:
        key = (p["model"], p["phase"], p["weights"])
        p["front"] = p["chip_ms_per_token"] < cheapest.get(key, float("inf"))
        cheapest[key] = min(p["chip_ms_per_token"], cheapest.get(key, float("inf")))


def main() -> None:
    questions = (
        (m, s, p, b, w) for m in MODELS for s in SLICES for p in ("decode", "prefill") for b in BATCHES for w in (DType.INT8, DType.BF16)
    )
    points = [found for one in questions if (found := point(*one)) is not None]
    mark_front(points)
    results = {"context": CONTEXT, "points": points}
    write(__file__, results)


if __name__ == "__main__":
    main()
