"""What the model of a tokenizer.json certainly sees of a text, after all that is done to the text before.

It decides how few tokens the text can have, so it may be less than what the model sees, never more; and it is found in far less time than
the text is encoded, without keeping other threads waiting for long.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from partinf.checkpoint.tokenizer.marks import alternatives

View = Callable[[str], str]

_FORMS = ("NFC", "NFKC", "NFD", "NFKD")
_BESIDE_ASCII = re.compile(r"[\x00-\x7f]?[^\x00-\x7f]+")
# Characters that never join with what stands before them: Latin, Greek, Cyrillic, Chinese, Japanese and Korean ones (without the single
# letters of Korean, which do), and emoji.
_APART = re.compile("[\x00-\u02ff\u0370-\u0482\u3030-\u3098\u309b-\u312f\u3190-\u9fff\uac00-\ud7a3\U0001f000-\U0001faff]")
_PART, _LONGEST_PART = 1 << 14, 1 << 17  # characters that are normalized at once


def steps(part: Any, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder in order, sequences unrolled."""

    def unrolled(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [one for each in step[inner] for one in unrolled(each)] if step["type"] == "Sequence" else [step]

    return [] if part is None else unrolled(json.loads(part.__getstate__()))


def seen_by_model(backend: Any) -> View | None:
    """A text as the model sees it, or less of it. None where any part of it may vanish."""
    from tokenizers.models import BPE

    model = backend.model
    if not isinstance(model, BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    done = [*steps(backend.normalizer, "normalizers"), *steps(backend.pre_tokenizer, "pretokenizers")]
    tokens = [token for token in backend.get_added_tokens_decoder().values() if token.content]
    # Where every token is found in the text as it is given, the stretches between their names are normalized one by one.
    plain = not any(token.normalized or token.single_word for token in tokens)
    names = re.compile(alternatives([token.content for token in tokens]) if tokens else "(?!)") if plain else None
    views = [_view(step, names) for step in done]
    known = [view for view in views if view is not None]
    return functools.partial(_through, known) if len(known) == len(views) else None


def _through(views: list[View], text: str) -> str:
    for view in views:
        text = view(text)
    return text


def _view(step: Mapping[str, Any], names: re.Pattern[str] | None) -> View | None:
    """What one step makes of a text, or less than that; None where it may take any part of it away."""
    kind = step["type"]
    if kind in _FORMS:
        return functools.partial(_normalized, kind, names)
    if kind == "Lowercase":
        return lambda text: re.sub(r"[^\x00-\x7f]+", "", text).lower()
    if kind == "Replace" and len(step["pattern"].get("String", "")) == 1:
        return lambda text: text.replace(step["pattern"]["String"], step["content"])
    if kind == "Metaspace":
        return lambda text: text.replace(" ", step["replacement"])
    only_adds = kind in ("Prepend", "ByteLevel", "Digits", "UnicodeScripts")
    only_cuts = kind in ("Split", "Punctuation") and step["behavior"] != "Removed"
    return _unchanged if only_adds or only_cuts else None


def _unchanged(text: str) -> str:
    return text


def _normalized(form: str, names: re.Pattern[str] | None, text: str) -> str:
    """A text in a form of Unicode; without the names of tokens, where it is not known how they stand in it."""
    if text.isascii():
        return text
    if names is None:
        return _BESIDE_ASCII.sub("", text)  # a letter may join with accents that follow it; the rest of ASCII stays
    from tokenizers import normalizers

    normalize = getattr(normalizers, form)().normalize_str
    made, start = [], 0
    for name in names.finditer(text):
        made += [*_by_parts(normalize, text[start : name.start()]), name.group()]
        start = name.end()
    return "".join([*made, *_by_parts(normalize, text[start:])])


def _by_parts(normalize: View, text: str) -> list[str]:
    """A text normalized part by part, cut where nothing joins with what stands before it; without parts in which there is no such place."""
    made, start = [], 0
    while start < len(text):
        cut = _APART.search(text, start + _PART)
        end = cut.start() if cut else len(text)
        if end - start <= _LONGEST_PART:
            made.append(normalize(text[start:end]))
        start = end
    return made
