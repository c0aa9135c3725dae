"""Matrices in four bits (MXFP4), as the experts of gpt-oss are published, widened while they are read.

Every 32 numbers along a row are 16 bytes, two numbers in a byte and the first in its low half, and a power of two that all are multiplied
by (OCP Microscaling Formats v1.0, 2023: elements E2M1, scales E8M0 with a bias of 127). A number has two bits of mantissa at most, so
bfloat16 holds it exactly.
"""

from __future__ import annotations

import math

import numpy as np

from partinf.checkpoint.safetensors_files import TensorReader

BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of the names of what is stored of a tensor."""
_BLOCK, _BIAS = 32, 127
_ELEMENTS = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_HALVES = np.concatenate([_ELEMENTS, -_ELEMENTS])
_PAIRS = np.stack([_HALVES[np.arange(256) & 15], _HALVES[np.arange(256) >> 4]], axis=-1)  # of each byte, the two numbers


def stored_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Of a tensor of a shape, what is stored: ending of the name → shape."""
    blocks = math.ceil(shape[-1] / _BLOCK)
    return {BLOCKS: (*shape[:-1], blocks, _BLOCK // 2), SCALES: (*shape[:-1], blocks)}


def widen(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks [.., n, 16] with scales [.., n], both uint8, as float32 [.., 32·n]."""
    numbers = _PAIRS[blocks].reshape(*scales.shape, _BLOCK)
    return np.ldexp(numbers, scales[..., None].astype(np.int32) - _BIAS).reshape(*scales.shape[:-1], -1)


def read(reader: TensorReader, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """`tensor[index]` in float32, of slices without a step; reads the blocks under it alone."""
    *rows, columns = index
    first, last = columns.start // _BLOCK, math.ceil(columns.stop / _BLOCK)
    where = (*rows, slice(first, last))
    wide = widen(reader.read(f"{name}{BLOCKS}", (*where, slice(None))), reader.read(f"{name}{SCALES}", where))
    return wide[..., columns.start - first * _BLOCK : columns.stop - first * _BLOCK]
