"""Print results.json as the table of the README.

python -m experiments.long_context.table
"""

from __future__ import annotations

from experiments.results import read


def main() -> None:
    results = read(__file__)
    print("| model | batch | context | the planner's choice | ms | KV GB | without sequence axes | ms | KV GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in results["cases"]:
        cells = [case["model"], case["batch"], case["context"]]
        for figures in (case["best"], case["without_sequence"]):
            fits = "" if figures["fits"] else " (does not fit)"
            cells += [figures["roles"] + fits, figures["step_ms"], figures["kv_gb_per_device"]]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
