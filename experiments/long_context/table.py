"""Print results.json as the table of the README.

python -m experiments.long_context.table
"""

from __future__ import annotations

import json
from pathlib import Path


def main() -> None:
    results = json.loads((Path(__file__).parent / "results.json").read_text())
    print("| model | batch | context | the planner's choice | ms | KV GB | without sequence axes | ms | KV GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in results["cases"]:
        cells = [case["model"], case["batch"], case["context"]]
        for figures in (case["best"], case["undealt"]):
            fits = "" if figures["fits"] else " (does not fit)"
            cells += [figures["roles"] + fits, figures["step_ms"], figures["kv_gb_per_device"]]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
