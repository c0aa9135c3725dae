"""The fixture tokenizers, and copies of them with other files next to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from partinf.checkpoint.tokenizer import Tokenizer, load_tokenizer
from tests.checkpoint.paths import FIXTURES

KINDS = {
    "byte_level": FIXTURES / "tokenizer_byte_level",
    "sentencepiece": FIXTURES / "tokenizer_sentencepiece",
    "pieces_as_json": FIXTURES / "tokenizer_sentencepiece" / "as_json",
}
TOKENIZERS = {kind: load_tokenizer(path) for kind, path in KINDS.items()}
each_kind = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def copy(kind: str, to: Path, **files: object) -> Tokenizer:
    """A tokenizer with other json files next to it; None removes a file."""
    shutil.copytree(KINDS[kind], to, dirs_exist_ok=True)
    for name, content in files.items():
        if content is None:
            (to / f"{name}.json").unlink()
        else:
            (to / f"{name}.json").write_text(json.dumps(content))
    return load_tokenizer(to)


def content_of(kind: str, name: str = "tokenizer") -> dict[str, Any]:
    """The JSON of a file of a fixture."""
    content: dict[str, Any] = json.loads((KINDS[kind] / f"{name}.json").read_text())
    return content
