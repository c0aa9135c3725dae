"""The ids that end a text, of all the places that name some."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partinf.checkpoint.tokenizer.settings import Settings, read_optional
from partinf.checkpoint.tokenizer.vocabulary import Vocabulary
from partinf.foundation.documents import shown
from partinf.foundation.errors import raise_offences

_FILES = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class Ends:
    """Ids that end a text; `note` says which and why, for the user who starts a model, where that is not plain from any one file."""

    ids: frozenset[int]
    note: str | None


def ends_of_text(directory: Path, settings: Settings, vocabulary: Vocabulary) -> Ends:
    """The union of `eos_token_id` of generation_config.json and of config.json, and of the tokenizer's EOS token.

    transformers and vLLM each stop at a part of this union, and which part depends on what is missing. A model that is trained to end its
    turn with one of these ids never means another of them as text.

    Raises:
        InvalidInput: ids of another type, or outside the vocabulary: a model never samples them, so that its texts would never end.
    """
    offences: list[str] = []
    sources, size = _named_by_files(directory, vocabulary.vocab_size, offences)
    named = settings.names.get("eos_token")
    own = vocabulary.eos_id
    if own is not None and own >= size:
        offences.append(f"{directory}: the tokenizer's EOS {shown(named)} is id {own}; the ids of the model are 0 to {size - 1}")
    sources["the tokenizer"] = [] if own is None else [own]
    raise_offences(offences)
    ends = frozenset(token for found in sources.values() for token in found)
    notes = [_note(sources, ends, vocabulary)]
    if named is not None and vocabulary.find(named) is None:
        notes.append(f"the tokenizer's EOS {shown(named)} is no token of its vocabulary, and is left out")
    return Ends(ends, "; ".join(filter(None, notes)) or None)


def ends_by_id(directory: Path, vocab_size: int) -> frozenset[int]:
    """The ids that end a text of a model without a tokenizer: the union of what the two files name.

    Raises:
        InvalidInput: as `ends_of_text`.
    """
    offences: list[str] = []
    sources, _ = _named_by_files(directory, vocab_size, offences)
    raise_offences(offences)
    return frozenset(token for found in sources.values() for token in found)


def _named_by_files(directory: Path, vocab_size: int, offences: list[str]) -> tuple[dict[str, list[int]], int]:
    """The ids that each file names, and how many ids the model has: `vocab_size` where config.json does not say."""
    files = {name: read_optional(directory / name) for name in _FILES}
    size = _vocabulary_size(files["config.json"]) or vocab_size
    sources: dict[str, list[int]] = {}
    for name, content in files.items():
        value = content.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool):
                offences.append(f"{directory / name}: eos_token_id holds {shown(token)}; expected an id or a list of ids")
            elif not 0 <= token < size:
                offences.append(f"{directory / name}: eos_token_id holds {shown(token)}, which is no token; the ids are 0 to {size - 1}")
        sources[name] = ids
    return sources, size


def _vocabulary_size(config: dict[str, Any]) -> int | None:
    """Of the model, which may have more ids than its tokenizer has tokens."""
    inner = config.get("text_config")
    values = [config.get("vocab_size"), inner.get("vocab_size") if isinstance(inner, dict) else None]
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0), None)


def _note(sources: dict[str, list[int]], ids: frozenset[int], vocabulary: Vocabulary) -> str | None:
    if not ids:
        return "no file names a token that ends a text; texts end at their greatest length"
    named = {source: sorted(set(found)) for source, found in sources.items() if found}
    if len({tuple(found) for found in named.values()}) == 1:
        return None
    tokens = ", ".join(f"{token} {vocabulary.name(token)}".rstrip() for token in sorted(ids)[:8]) + (", …" if len(ids) > 8 else "")
    return f"a text ends at {tokens}: all that {', '.join(named)} name"
