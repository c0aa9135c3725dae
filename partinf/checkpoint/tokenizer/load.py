"""Finds the tokenizer of a model directory."""

from __future__ import annotations

from pathlib import Path

from partinf.checkpoint.tokenizer.ends import ends_of_text
from partinf.checkpoint.tokenizer.json_vocabulary import JsonVocabulary
from partinf.checkpoint.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary
from partinf.checkpoint.tokenizer.settings import is_present, read_settings
from partinf.checkpoint.tokenizer.text import Tokenizer
from partinf.checkpoint.tokenizer.vocabulary import Vocabulary
from partinf.foundation.errors import InvalidInput

JSON_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"


def find_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer of a model directory; None where it has none, and the model is used by token ids.

    Raises:
        InvalidInput: as `load_tokenizer` does of files that are there.
    """
    return load_tokenizer(directory) if has_tokenizer(directory) else None


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a directory has a file that a tokenizer is read from."""
    return any(is_present(Path(directory) / name) for name in (JSON_FILE, SENTENCEPIECE_FILE))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model directory: tokenizer.json, or else a sentencepiece tokenizer.model.

    `tokenizer_config.json` and `special_tokens_map.json` name the special tokens, and say whether BOS and EOS are added; where they do
    not, the post-processor of tokenizer.json does, and a sentencepiece model has BOS added and no EOS.

    Raises:
        InvalidInput: neither file is there, one that is there cannot be read, or an id that ends a text lies outside the vocabulary.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InvalidInput(f"{directory}: no such directory; expected one with {JSON_FILE} or {SENTENCEPIECE_FILE}")
    settings = read_settings(directory)
    vocabulary: Vocabulary
    if is_present(directory / JSON_FILE):
        vocabulary = JsonVocabulary(directory / JSON_FILE, settings)
    elif is_present(directory / SENTENCEPIECE_FILE):
        vocabulary = SentencePieceVocabulary(directory / SENTENCEPIECE_FILE, settings)
    else:
        present = ", ".join(sorted(file.name for file in directory.iterdir())[:8]) or "nothing"
        raise InvalidInput(f"{directory}: no tokenizer: found {present}; expected {JSON_FILE} or {SENTENCEPIECE_FILE}")
    return Tokenizer(vocabulary, ends_of_text(directory, settings, vocabulary))
