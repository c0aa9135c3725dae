"""How few tokens a text can have, from the bytes that it is made of.

A text of n bytes has at least n / m tokens where no token has more than m bytes, which says little, as some tokens are long runs of
spaces. Two sharper bounds hold for every way to cut a text into tokens:

* Give every byte b the weight 1 / longest(b), where longest(b) is the length of the longest token in which b occurs. No token weighs more
  than 1: each of its bytes weighs at most 1 / its own length. So a text has at least as many tokens as its bytes weigh together.
* A byte that occurs c times in a text, and at most d times in any one token, needs at least c / d tokens.

Both hold for any part of the bytes as well, so bytes of which it is not certain that they end up in a token are left out.
"""

from __future__ import annotations

from collections.abc import Collection
from math import ceil

import numpy as np
import numpy.typing as npt


class LengthBound:
    """The bounds of one vocabulary.

    Args:
        tokens: what every token stands for, in bytes of the text as the model of the tokenizer sees it; one that stands for different
            bytes at different times may be given several times.
        counted: the byte values that always end up in a token.
    """

    def __init__(self, tokens: Collection[bytes], counted: Collection[int]) -> None:
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        data = np.frombuffer(b"".join(tokens), np.uint8).astype(np.int64)
        owners = np.repeat(np.arange(len(tokens)), lengths)
        longest, self._most = np.ones(256, np.int64), np.ones(256, np.int64)
        np.maximum.at(longest, data, lengths[owners])
        pairs, times = np.unique(owners * 256 + data, return_counts=True)
        np.maximum.at(self._most, pairs % 256, times)
        self._weights = 1 / longest
        self._counted = np.zeros(256, np.int64)
        self._counted[list(counted)] = 1

    def least(self, *parts: bytes) -> int:
        """The fewest tokens of a text that is cut into these parts before anything else."""
        counts = np.zeros(256, np.int64)
        for part in parts:
            counts += np.bincount(np.frombuffer(part, np.uint8), minlength=256)
        return self._of(counts * self._counted)

    def _of(self, counts: npt.NDArray[np.int64]) -> int:
        # The sum is rounded some hundred times; what that may add must not make a whole number more.
        weight = ceil(float(counts @ self._weights) * (1 - 1e-12) - 1e-9)
        return max(weight, int((-(-counts // self._most)).max()))
