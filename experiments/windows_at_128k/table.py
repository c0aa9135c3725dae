"""results.json as the table of the README.

python -m experiments.windows_at_128k.table
"""

from __future__ import annotations

from experiments.results import place, read


def main() -> None:
    names = (
        "model",
        "batch",
        "with windows",
        "ms",
        "KV GB",
        "smallest",
        "with full attention",
        "ms",
        "KV GB",
        "smallest",
        "windows there, ms",
    )
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for case in read(__file__)["cases"]:
        cells = [case["model"], case["batch"]]
        for which in ("windows", "full_attention"):
            figures = case[which]
            fits = "" if figures["fits"] else " (does not fit)"
            cells += [
                f"{figures['storage']}: {figures['roles']}{fits}",
                figures["step_ms"],
                figures["kv_gb_per_device"],
                case["smallest"][which] or "none",
            ]
        lines.append("| " + " | ".join(map(str, [*cells, case["windows_under_its_layout"]["step_ms"]])) + " |")
    print(*lines, sep="\n")
    place(__file__, "\n".join(lines))


if __name__ == "__main__":
    main()
