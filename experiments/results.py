"""What experiments share: results next to their scripts, the machine, medians, and the colours of pictures."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BLUE, AMBER, RED, PURPLE, GREY = "#3b6ea5", "#e0a030", "#b5483a", "#7a4f9a", "#9a9a9a"


def next_to(script: str, name: str = "results.json") -> Path:
    """A file in the folder of a script, which is given as its `__file__`."""
    return Path(script).with_name(name)


def read(script: str, name: str = "results.json", missing: Any = None) -> Any:
    """What an experiment wrote, or `missing`, where that is given and there is no file."""
    path = next_to(script, name)
    return missing if missing is not None and not path.exists() else json.loads(path.read_text())


def write(script: str, found: Any, name: str = "results.json") -> None:
    """Write figures next to the script."""
    next_to(script, name).write_text(json.dumps(found, indent=1) + "\n")


def place(script: str, text: str, mark: str = "table", name: str = "README.md") -> None:
    """Put a table into a page next to the script, in place of what stands between its lines `<!-- MARK -->` and `<!-- end -->`.

    Raises:
        ValueError: the page has no such lines.
    """
    page = next_to(script, name)
    before, begun, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    _, ended, after = rest.partition("<!-- end -->")
    if not (begun and ended):
        raise ValueError(f"{page}: no line '<!-- {mark} -->' with '<!-- end -->' below")
    page.write_text(f"{before}{begun}{text}\n{ended}{after}")


def machine() -> str:
    """What an experiment ran on: `2 cores, x86_64`."""
    return f"{os.cpu_count()} cores, {platform.machine()}"


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every figure over runs that have the same ones."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}
