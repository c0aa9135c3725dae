"""int8 weights and KV as ordinary pytrees: values and the scale of each output channel.

A weight's scale covers the whole contraction (all of E for W_in, all of F for W_out), so the quantised model is the same on every mesh
and a partial product can be scaled before it is summed. A key or value is scaled per token and head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST = 127.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """An int8 array with float32 scales: the array is values · scale, the scale repeated along the contracted dimensions.

    Attributes:
        values: int8. scale: float32, the shape of `values` without the contracted dimensions.
        contracted: counted from the end (-1 is the last), so that a leading layer dimension changes nothing.
    """

    values: Any
    scale: Any
    contracted: tuple[int, ...] = field(metadata={"static": True})

    @property
    def contracted_dims(self) -> frozenset[int]:
        """The contracted dimensions of `values`, counted from the front."""
        return frozenset(dim % len(self.shape) for dim in self.contracted)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)


def quantize(array: Any, contracted: tuple[int, ...]) -> Quantized:
    """Round to the nearest of 255 levels per channel; numpy in, numpy out, and the same numbers from jax.

    A channel that holds anything but numbers has scale NaN, and so is NaN as a whole.
    """
    library: Any = np if isinstance(array, np.ndarray) else jnp
    wide = array.astype(np.float32)
    magnitude = library.abs(wide)
    if library is jnp:  # whose maximum may pass over NaN on a CPU; numpy's does not
        magnitude = jnp.where(jnp.isnan(magnitude), jnp.inf, magnitude)
    largest = library.max(magnitude, axis=contracted, keepdims=True)
    scale = library.where(library.isfinite(largest), largest / _LARGEST, np.float32(np.nan))
    scale = library.where(largest == 0, 1.0, scale).astype(np.float32)
    levels = library.where(library.isnan(scale), 0.0, library.rint(wide / scale))
    values = library.clip(levels, -_LARGEST, _LARGEST).astype(np.int8)
    return Quantized(values, library.squeeze(scale, axis=contracted), contracted)


def dequantize(array: Quantized, dtype: Any) -> Any:
    """values · scale in `dtype`."""
    library: Any = np if isinstance(array.values, np.ndarray) else jnp
    scale = library.expand_dims(array.scale, array.contracted)
    return (array.values.astype(np.float32) * scale).astype(dtype)
