"""A Llama on one CPU, compared with transformers, vLLM and llama.cpp: time of decode steps and of a prompt. Writes results.json
and README's tables.

    python -m experiments.llama_125m_on_cpu.measure --torch-python PYTHON --vllm-python PYTHON --llama-python PYTHON

Each side (`peers`) lives in a process of its own with all cores, and one runs at a time: the others are stopped (SIGSTOP) meanwhile,
whatever their threads would do. One round measures every case once on every side, in an order that turns; figures are medians over the
rounds, ratios medians of the rounds' ratios to the fastest of the others. What else the machine did is measured too, and reported.
Sides whose interpreter is not given are left out. PYTHON of vLLM may be that of transformers; that of llama.cpp needs `llama-cpp-python`,
built on this machine, and `gguf`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from experiments.llama_125m_on_cpu.peers import ENGINES, SIDES, lengths
from experiments.results import machine, next_to, write
from partinf.model.load import load_model_config
from partinf.transformer.kernels import choices
from partinf.transformer.machine import host

CASES = ("decode:1:256", "decode:8:256", "decode:32:256", "decode:64:256", "decode:8:2048", "prefill:1:512", "load:32:48")
QUIET = 0.05  # of all cores, that others may take
_TICKS = os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)


class Side:
    """A process that measures, stopped whenever it is not its turn."""

    def __init__(self, python: str, name: str, dtype: str, shape: str) -> None:
        command = [python, str(Path(__file__).with_name("peers.py")), name, dtype, shape]
        root = str(Path(__file__).resolve().parents[2])
        environment = os.environ | ({"PYTHONPATH": root} if name == "partinf" else {})
        self.name, self.facts = name, {}
        self._process = subprocess.Popen(  # in a process group of its own, which signals stop as a whole
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, process_group=0
        )
        assert self._read() == "ready"
        self._signal(signal.SIGSTOP)

    def seconds(self, case: str) -> tuple[float, float]:
        """Median seconds of a few calls, and the part of all cores that others took meanwhile."""
        self._signal(signal.SIGCONT)
        started, busy, own = time.perf_counter(), _busy(), self._taken()
        self._process.stdin.write(case.replace(":", " ") + "\n")
        self._process.stdin.flush()
        found, _, facts = self._read().partition(" ")
        self.facts = json.loads(facts)
        others = (_busy() - busy - (self._taken() - own)) / _TICKS / (time.perf_counter() - started)
        self._signal(signal.SIGSTOP)
        return float(found), max(0.0, others)

    def takes(self, case: str) -> bool:
        return not case.startswith("load") or self.name in ENGINES

    def close(self) -> None:
        self._signal(signal.SIGKILL)  # it has nothing to keep
        self._process.wait()

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def _taken(self) -> int:
        """Ticks of all processes of this side."""
        found = 0
        for folder in Path("/proc").iterdir():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split() if folder.name.isdigit() else []
            except OSError:  # it has ended
                continue
            if fields and int(fields[2]) == self._process.pid:  # its group
                found += int(fields[11]) + int(fields[12])
        return found

    def _read(self) -> str:
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}")
        return line


def _busy() -> int:
    """Ticks that all cores were busy, or taken from this machine by the one that it runs on."""
    user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return user + nice + system + irq + soft + steal


def compare(dtype: str, pythons: dict[str, str], shape: str, cases: list[str], rounds: int) -> dict[str, Any]:
    """Every case of one type on every side."""
    sides: list[Side] = []
    taken: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    facts: dict[str, dict[str, Any]] = {case: {} for case in cases}
    others: list[float] = []
    try:
        for name in SIDES[dtype]:
            if name in pythons:
                sides.append(Side(pythons[name], name, dtype, shape))
        for case in cases:  # what is prepared once is not measured
            for side in sides:
                if side.takes(case):
                    side.seconds(case)
        for number in range(rounds):
            order = sides[number % len(sides) :] + sides[: number % len(sides)]
            for case in cases:
                found = {side.name: side.seconds(case) for side in order if side.takes(case)}
                taken[case].append({name: seconds for name, (seconds, _) in found.items()})
                facts[case] |= {side.name: side.facts for side in order if side.facts}
                others += [part for _, part in found.values()]
    finally:
        for side in sides:
            side.close()
    result: dict[str, Any] = {"others": statistics.median(others), "others_most": max(others), "cases": {}}
    for case, turns in taken.items():
        medians = {name: 1e3 * statistics.median(turn[name] for turn in turns) for name in turns[0]}
        peers = {name: took for name, took in medians.items() if name != "partinf"}
        best = min(peers, key=lambda name: peers[name], default="partinf")
        ratio = statistics.median(turn["partinf"] / turn[best] for turn in turns)
        result["cases"][case] = {"ms": medians, "best": best, "ratio": ratio, "rounds": turns}
        result["cases"][case] |= facts[case] and {"facts": facts[case]}
        if case.startswith("load"):
            tokens = sum(answer for _, answer in lengths(int(case.split(":")[2])))
            result["cases"][case]["tokens_per_second"] = {name: 1e3 * tokens / took for name, took in medians.items()}
        print(line(dtype, case, result["cases"][case]), flush=True)
    if result["others"] > QUIET:
        print(
            f"{dtype}: the machine was not quiet: others took {result['others']:.0%} of it (at most {result['others_most']:.0%})",
            flush=True,
        )
    return result


def line(dtype: str, case: str, found: dict[str, Any]) -> str:
    """One type and case as it is printed, and written into README."""
    times = "  ".join(f"{name} {took:8.2f}" for name, took in found["ms"].items())
    own = found.get("facts", {}).get("partinf")
    steps = f"; {own['steps']} steps, {own['rows_per_token']:.2f} rows per token" if own else ""
    ratio = f"{found['ratio']:.2f} × {found['best']}" if len(found["ms"]) > 1 else "alone"
    return f"{dtype:9} {case:15} {times}  {ratio}{steps}"


def write_page() -> None:
    """README's tables, of every result that lies next to it: what was measured and when, and what else ran."""
    page, parts = next_to(__file__, "README.md"), []
    for path in sorted(page.parent.glob("results*.json")):
        found = json.loads(path.read_text())
        rows = [line(dtype, case, each) for dtype, of_type in found["types"].items() for case, each in of_type["cases"].items()]
        others = max(of_type["others"] for of_type in found["types"].values())
        said = f"{found['model']} on {found['date']} ([{path.name}]({path.name})), while others took {others:.0%} of the machine at most"
        parts.append("\n".join((f"{said} (the median of a type's calls):", "", "```", *rows, "```")))
    before, _, after = page.read_text().partition("<!-- tables -->")
    page.write_text("\n".join((f"{before}<!-- tables -->", "\n\n".join(parts), f"<!-- end -->{after.partition('<!-- end -->')[2]}")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("torch", "vllm", "llama"):
        parser.add_argument(f"--{name}-python", metavar="PYTHON")
    parser.add_argument("--model", default="llama-125m", help="a shipped architecture of the Llama family (default: llama-125m)")
    parser.add_argument("--types", default=",".join(SIDES))
    parser.add_argument("--cases", default=",".join(CASES), help="PHASE:ROWS:TOKENS,…")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="results.json")
    args = parser.parse_args()
    config = load_model_config(args.model)
    shape = {key: value for key, value in asdict(config).items() if isinstance(value, int)} | {"name": args.model}
    given = {"transformers": args.torch_python, "vllm": args.vllm_python, "llama.cpp": args.llama_python}
    pythons = {"partinf": sys.executable} | {name: python for name, python in given.items() if python}
    forms = {kind: [[rows, str(form)] for rows, form in lines] for kind, lines in choices.current().table}
    found: dict[str, Any] = {
        "date": str(date.today()),
        "machine": machine(),
        "cpu": host(),
        "model": args.model,
        "forms": forms,
        "types": {},
    }
    for dtype in args.types.split(","):
        found["types"][dtype] = compare(dtype, pythons, json.dumps(shape), args.cases.split(","), args.rounds)
        write(__file__, found, args.output)
    write_page()


if __name__ == "__main__":
    main()
