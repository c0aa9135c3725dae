"""The tokenizer of the demo model: a SentencePiece character model with one piece for every word of the task format.

Characters alone would round-trip any lower-case text but spend two tokens per letter (" a" is a space and a letter), and longer
sequences are what a small model has trouble with. So the words of the format are pieces of their own ("user defined symbols", which
SentencePiece always matches, longest first); single characters remain for everything else. Normalisation is `identity`, without a
dummy prefix and without the removal of spaces: otherwise decode(encode(text)) would not be `text`.
"""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece

from partinf.demo_tasks import LETTERS, MAX_NUMBER, SEPARATOR, TASKS

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space inside a piece
UNK, BOS, EOS, PAD = range(4)


def word_pieces() -> list[str]:
    """The words of the task format: task names at the start of a text, everything else after a space."""
    names = [f"{kind}:" for kind in TASKS]
    after_space = ["=", "?", *LETTERS, *(str(number) for number in range(1, MAX_NUMBER + 1))]
    return names + [SPACE + word for word in after_space]


def train_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Train the tokenizer, write it to `path` and return it. Nothing in it is random."""
    characters = [*LETTERS, *"0123456789", "=", SEPARATOR, SPACE]
    words = word_pieces()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["".join(characters).replace(SPACE, " ")]),
        model_writer=model,
        model_type="char",
        vocab_size=4 + len(words) + len(characters),
        character_coverage=1.0,
        user_defined_symbols=words,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        pad_piece="<pad>",
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
