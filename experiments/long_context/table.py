"""results.json as the table of the README.

python -m experiments.long_context.table
"""

from __future__ import annotations

from experiments.results import place, read


def main() -> None:
    lines = ["| model | batch | context | the planner's choice | ms | KV GB | without sequence axes | ms | KV GB |", "|---" * 9 + "|"]
    for case in read(__file__)["cases"]:
        cells = [case["model"], case["batch"], case["context"]]
        for figures in (case["best"], case["without_sequence"]):
            fits = "" if figures["fits"] else " (does not fit)"
            cells += [figures["roles"] + fits, figures["step_ms"], figures["kv_gb_per_device"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    print(*lines, sep="\n")
    place(__file__, "\n".join(lines))


if __name__ == "__main__":
    main()
