"""MT-NLG 530B on 16 and 32 A100s: predicted from specifications alone, row by row against FasterTransformer's measured times.

Tensor parallelism over nodes of eight: all axes split F and heads, the one between nodes too. A search never stores weights over the
network between slices, so the layout is written by hand.

python -m experiments.fastertransformer_mtnlg.measure     writes results.json next to this file
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.results import write
from partinf.cost.calibration import ROOFLINE
from partinf.cost.ledger import EntryKind, Ledger
from partinf.cost.pricing import Pricing
from partinf.cost.program import Program, Residual
from partinf.cost.step import step_ledger
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.planner.evaluate import Evaluator
from partinf.workload import Workload

INPUT, OUTPUT = 60, 20
# One all-reduce per sublayer over all devices, prompts attended to one by one, scores stored, nothing overlapped.
PROGRAM = Program("FasterTransformer", per_prompt_attention=True, blocked_attention=False, residual=Residual.WHOLE)


@dataclass(frozen=True)
class Row:
    """One measured point: total milliseconds of 60 tokens in and 20 out (Pope et al., 2023, appendix D, from NVIDIA's report)."""

    ways: int
    batch: int
    measured_ms: float


ROWS = (
    Row(16, 1, 1379),
    Row(16, 32, 2361),
    Row(16, 128, 5406),
    Row(32, 1, 1037),
    Row(32, 32, 1804),
    Row(32, 128, 4099),
    Row(32, 256, 7203),
)


def ledgers(row: Row) -> tuple[Ledger, Ledger]:
    """The prefill step and one decode step at the middle of the output."""
    slice_ = parse_slice(f"a100-80:8*{row.ways // 8}")
    axes = tuple(slice_.axis_sizes)
    layout = make_layout(dict.fromkeys(axes, "ffn"), dict.fromkeys(axes, "heads"))
    evaluator = Evaluator(load_model_config("mt-nlg-530b"), Pricing(slice_, ROOFLINE, program=PROGRAM), Workload(row.batch, INPUT, OUTPUT))
    prefill, decode = (step_ledger(evaluator.split(layout, label, 0)) for label in ("prefill", "decode"))
    return prefill, decode


def predicted(row: Row) -> dict[str, float]:
    """Milliseconds in total and by what they are spent on."""
    prefill, decode = ledgers(row)
    total = prefill + decode.times(OUTPUT)
    collectives = total.of(kind=EntryKind.COLLECTIVE).seconds
    return {
        "total": 1e3 * total.seconds,
        "prefill": 1e3 * prefill.seconds,
        "decode step": 1e3 * decode.seconds,
        "collectives": 1e3 * collectives,
        "matmuls and attention": 1e3 * (total.seconds - collectives),
    }


def main() -> None:
    rows = []
    for row in ROWS:
        found = predicted(row)
        rows.append({"ways": row.ways, "batch": row.batch, "measured_ms": row.measured_ms, "ratio": row.measured_ms / found["total"]})
        rows[-1]["predicted_ms"] = found
        print(f"TP{row.ways} batch {row.batch:3}: {found['total']:7.0f} ms, measured {row.measured_ms:.0f}, ratio {rows[-1]['ratio']:.2f}")
    write(__file__, {"rows": rows})


if __name__ == "__main__":
    main()
