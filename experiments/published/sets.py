"""The sets of published.toml, as they stand in the file."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).with_name("published.toml")


@functools.cache
def sets() -> tuple[dict[str, Any], ...]:
    """The sets as they stand in the file, every row a table of its columns."""
    found = tomllib.loads(PUBLISHED.read_text())["set"]
    return tuple(one | {"rows": [dict(zip(one["columns"], row, strict=True)) for row in one["rows"]]} for one in found)
