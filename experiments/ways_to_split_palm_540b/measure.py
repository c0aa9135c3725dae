"""The best layout of every FFN kind for PaLM 540B on 64 TPU v4 chips, in decode and in prefill, with its time by kind of work.

python -m experiments.ways_to_split_palm_540b.measure     writes results.json next to this file
"""

from __future__ import annotations

from experiments.results import write
from partinf.cost.items import What
from partinf.cost.ledger import EntryKind, Ledger
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.workload import DType, Workload

STEPS = {
    "decode, 64 sequences at context 2048, int8": Workload(64, context_len=2048, phase="decode", weights=DType.INT8),
    "decode, 512 sequences at context 2048, bf16": Workload(512, context_len=2048, phase="decode"),
    "prefill of 1 × 2048 tokens, int8": Workload(1, input_len=2048, phase="prefill", weights=DType.INT8),
    "prefill of 512 × 2048 tokens, bf16": Workload(512, input_len=2048, phase="prefill"),
}


def shares(ledger: Ledger) -> dict[str, float]:
    """Exposed milliseconds by kind of work."""
    weights = [entry for entry in ledger.of(kind=EntryKind.COLLECTIVE).entries if entry.item.what is What.WEIGHTS]
    collectives = ledger.of(kind=EntryKind.COLLECTIVE).seconds
    gathers = sum(entry.exposed_seconds for entry in weights)
    matmuls = ledger.of(kind=EntryKind.MATMUL).seconds
    attention = ledger.of(kind=EntryKind.ATTENTION).seconds
    parts = {
        "matmuls": matmuls,
        "attention core": attention,
        "activation collectives": collectives - gathers,
        "weight gathers": gathers,
        "other": ledger.seconds - matmuls - attention - collectives,
    }
    return {name: 1e3 * seconds for name, seconds in parts.items()}


def main() -> None:
    model, slice_ = load_model_config("palm-540b"), parse_slice("v4:4x4x4")
    results = []
    for label, workload in STEPS.items():
        report = search(model, slice_, workload)
        best: dict[str, dict[str, object]] = {}
        for candidate in report.candidates:
            phase = candidate.main
            if candidate.fits and phase.ffn != "other" and phase.ffn not in best:
                milliseconds = 1e3 * phase.step_seconds
                best[phase.ffn] = {
                    "layout": candidate.name,
                    "attention": phase.attention,
                    "ms": milliseconds,
                    "parts": shares(phase.ledger),
                }
        results.append({"step": label, "best": best})
    write(__file__, {"model": model.name, "slice": slice_.name, "steps": results})


if __name__ == "__main__":
    main()
