"""Every family against transformers: tiny models made anew, run by this library, and compared.

    python -m experiments.families.matrix --transformers PYTHON [--seed 1] [--folder FOLDER] [CASE …]

PYTHON is an interpreter that has torch and transformers, which this library needs nowhere else. It makes a directory for every case of
`cases.py`, of sizes and weights that follow from the seed. Each is loaded here by its config.json and its tensors alone, and served in
float32: prompts that cross the windows and the lengths of the training, in chunks of a few pages, the last two with a beginning in common.
transformers then scores the same sequences. A case is right where no log-probability, of the plain definition or of a generated token,
differs by more than 1e-4, and every generated token is the most likely one. Writes results.json next to itself, and docs/families.md with
the table. Where cases are named, the rows of the others stay as they were.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.families import cases
from experiments.results import next_to, write
from partinf.buckets import Capacity, with_capacity
from partinf.checkpoint.described import read_model
from partinf.checkpoint.hf import load_hf
from partinf.engine.engine import Engine
from partinf.engine.request import SamplingParams
from partinf.execution.runner import JaxRunner
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.partition.sharding import device_mesh
from partinf.plans import Plan
from partinf.transformer import reference
from partinf.transformer.params import abstract_params
from partinf.workload import DType

TOLERANCE, GENERATED = 1e-4, 12
LENGTHS = (5, 30, 58)  # of prompts; the last begins with the first 20 tokens of the one before
CHUNK, PAGE = 16, 4
PLAIN = make_layout({"x": "replica"}, {"x": "none"})


@dataclasses.dataclass
class Row:
    """What came of one case: `right`, `wrong` or `refused`, the largest difference of a log-probability, and why it was refused."""

    case: str
    model_type: str
    found: str
    difference: float | None = None
    why: str = ""


def prompts_of(vocab_size: int, seed: int) -> list[list[int]]:
    of = random.Random(seed)
    found = [[0] + [of.randrange(4, vocab_size) for _ in range(length - 1)] for length in LENGTHS]
    found[2][:20] = found[1][:20]
    return found


def run(directory: Path, seed: int) -> dict[str, Any]:
    """Serve the prompts of a directory: sequences with what was generated, its log-probabilities, and those of the plain definition.

    Raises:
        InvalidInput: a model that is not read.
    """
    case = json.loads((directory / "case.json").read_text())
    plan = Plan(read_model(directory), parse_slice("cpu:1"), PLAIN, weights=DType.F32, kv=DType.F32)
    plan = with_capacity(plan, Capacity(max_rows=4, max_len=cases.LONGEST, page_size=PAGE, prefill_tokens=CHUNK, random=False))
    plan = dataclasses.replace(plan, buckets=plan.buckets[-1:])  # the largest does what all do, and is compiled once
    params = load_hf(directory, plan.model, abstract_params(plan, device_mesh(plan), unrolled=False))
    engine = Engine(JaxRunner(plan, params), check_invariants=True)
    greedy = SamplingParams(max_tokens=GENERATED, logprobs=True, ignore_eos=True)
    outputs = [engine.generate([prompt], greedy)[0] for prompt in prompts_of(case["vocab_size"], seed)]  # each finds the last one's pages
    sequences = [[*output.prompt, *output.tokens] for output in outputs]
    padded = jnp.asarray([tokens + [0] * (cases.LONGEST - len(tokens)) for tokens in sequences])
    defined = np.asarray(jax.nn.log_softmax(reference.forward(params, plan.model, padded, cases.LONGEST), -1))
    return {
        "sequences": sequences,
        "logprobs": [list(output.logprobs or ()) for output in outputs],
        "defined": [rows[: len(tokens)] for rows, tokens in zip(defined, sequences, strict=True)],
    }


def compare(found: Mapping[str, Any], answers: Mapping[str, np.ndarray]) -> tuple[bool, float]:
    """Whether every generated token is transformers' most likely one, and the largest difference of a log-probability."""
    same, worst = True, 0.0
    for number, tokens in enumerate(found["sequences"]):
        scores = answers[f"logprobs_{number}"]
        start = len(tokens) - GENERATED
        same &= tokens[start:] == scores[start - 1 : -1].argmax(-1).tolist()
        theirs = scores[np.arange(start - 1, len(tokens) - 1), tokens[start:]]
        worst = max(worst, float(np.abs(theirs - found["logprobs"][number]).max()))
        worst = max(worst, float(np.abs(found["defined"][number] - scores).max()))
    return same, worst


def measure(folder: Path, python: str, seed: int, names: list[str]) -> None:
    """Make the cases, serve and compare them, and leave a `row.json` in the directory of each."""
    side = str(next_to(__file__, "transformers_side.py"))
    subprocess.run([python, side, "make", str(folder), str(seed), *names], check=True)
    found: dict[str, Any] = {}
    rows: dict[str, Row] = {}
    for directory in sorted(path.parent for path in folder.glob("*/case.json")):
        case = json.loads((directory / "case.json").read_text())
        if names and case["case"] not in names:
            continue
        row = rows[case["case"]] = Row(case["case"], case["model_type"], "refused")
        try:
            found[case["case"]] = run(directory, seed)
        except InvalidInput as error:
            row.why = "; ".join(line.split("config.json: ")[-1].split("config.json ")[-1] for line in error.offences)
            continue
        questions = {"sequences": found[case["case"]]["sequences"], "served": cases.LONGEST}
        (directory / "questions.json").write_text(json.dumps(questions))
        (directory / "answers.npz").unlink(missing_ok=True)
        print(f"{case['case']}: served", flush=True)
    subprocess.run([python, side, "answer", str(folder), *names], check=True)
    for answers in folder.glob("*/answers.npz"):
        name = json.loads((answers.parent / "case.json").read_text())["case"]
        if name in found:
            same, worst = compare(found[name], np.load(answers))
            rows[name].found = "right" if same and worst <= TOLERANCE else "wrong"
            rows[name].difference = worst
    for directory in (path.parent for path in folder.glob("*/case.json")):
        name = json.loads((directory / "case.json").read_text())["case"]
        if name in rows:
            (directory / "row.json").write_text(json.dumps(vars(rows[name])))


def collected(folder: Path) -> list[Row]:
    """The rows of all cases that were run with a folder, in the order of `cases.py`."""
    rows = [Row(**json.loads(path.read_text())) for path in folder.glob("*/row.json")]
    order = list(cases.CASES)
    return sorted(rows, key=lambda row: order.index(row.case))


def with_others(rows: list[Row]) -> list[Row]:
    """The rows with those that results.json has of other cases, in the order of `cases.py`."""
    run, file = {row.case for row in rows}, next_to(__file__, "results.json")
    before = json.loads(file.read_text())["rows"] if file.exists() else []
    order = list(cases.CASES)
    found = [*rows, *(Row(**row) for row in before if row["case"] not in run and row["case"] in order)]
    return sorted(found, key=lambda row: order.index(row.case))


def table(rows: list[Row]) -> str:
    lines = ["| model type | case | | largest difference, or why it is refused |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row.found == "refused", row.model_type)):
        remark = row.why if row.found == "refused" else f"{row.difference:.0e}"
        lines.append(f"| `{row.model_type}` | {row.case} | {row.found} | {remark} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", required=True, metavar="PYTHON", help="an interpreter that has torch and transformers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where models and rows go, and stay; a temporary folder by default")
    parser.add_argument("cases", nargs="*", help="names of cases.py; all by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        measure(folder, arguments.transformers, arguments.seed, arguments.cases)
        rows = collected(folder)
    counts = {kind: sum(row.found == kind for row in rows) for kind in ("right", "wrong", "refused")}
    types = {row.model_type for row in rows if row.found == "right"} - {row.model_type for row in rows if row.found == "wrong"}
    print(f"{counts['right']} right, {counts['wrong']} wrong, {counts['refused']} refused; {len(types)} model types run")
    for row in rows:
        if row.found != "right":
            print(f"{row.case}: {row.found}: {row.why or row.difference}")
    rows = with_others(rows)
    counts = {kind: sum(row.found == kind for row in rows) for kind in ("right", "wrong", "refused")}
    types = {row.model_type for row in rows if row.found == "right"} - {row.model_type for row in rows if row.found == "wrong"}
    write(__file__, {"seed": arguments.seed, "counts": counts, "model_types": sorted(types), "rows": [vars(row) for row in rows]})
    page = Path(__file__).parents[2] / "docs" / "families.md"
    before, _, after = page.read_text().partition("<!-- table -->\n")
    page.write_text(f"{before}<!-- table -->\n{table(rows)}\n<!-- end -->\n{after.partition('<!-- end -->' + chr(10))[2]}")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
