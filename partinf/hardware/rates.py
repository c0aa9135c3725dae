"""Measured rates of a device: what `partinf calibrate` finds, and all that a price of a step on such a device is made of.

The makers' figures and four constants describe a TPU, whose products run at one rate and hide what passes between them. Devices on which
that does not hold (CPUs above all, where a product of few rows is slow and attention slower) are described by more constants, each of
which is a time that can be measured: the rate of a product by its rows, of attention by what it reads and computes, of what passes
between products, and the time that one operation, one collective and one step take before they move anything.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from partinf.foundation.errors import InvalidInput, T

_PERMUTE, _ALL_GATHER = "collective-permute", "all-gather"


@dataclass(frozen=True)
class Curve:
    """A rate that depends on a size: measured at some sizes, a power law between them, constant beyond.

    Attributes:
        sizes: rising. rates: as many.
    """

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def __call__(self, size: float) -> float:
        above = bisect_right(self.sizes, size)
        if above == 0:
            return self.rates[0]
        if above == len(self.sizes):
            return self.rates[-1]
        low, high = self.sizes[above - 1 : above + 1]
        share = math.log(size / low) / math.log(high / low)
        return self.rates[above - 1] * (self.rates[above] / self.rates[above - 1]) ** share


@dataclass(frozen=True)
class TypeRates:
    """Rates of one device where activations have one type. `inf` where nothing was seen above the noise.

    Attributes:
        decode_kv: bytes/s at which the decode core passes over keys and values. decode_flops: FLOP/s of its products.
        prompt_flops: FLOP/s of the core of prompts.
        activations: bytes/s at which what products read and write passes between them: norms, rotations, nonlinearities, residuals.
        choice: bytes/s at which logits are read where a token is chosen.
        op_seconds: time of one product or core, however small, with what belongs to it. step_seconds: time of a step besides all else:
            dispatch, its arguments and its results.
    """

    decode_kv: float
    decode_flops: float
    prompt_flops: float
    activations: float
    choice: float
    op_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class CollectiveRate:
    """One kind of collective among `ways` devices.

    Attributes:
        seconds: time of one that moves next to nothing.
        factor: time of its bytes over what the links alone would take.
    """

    op: str
    ways: int
    seconds: float
    factor: float


@dataclass(frozen=True)
class PaceRates:
    """What a device takes of the times that its compiler states, where a compiled schedule is read (`partinf.proof.pace`). 0 where the
    compiler states none, and the shipped constant holds.

    Attributes:
        product_share: of a product whose matrix lies on the chip. moving_share: of an operation that only moves.
        least_seconds: what the compiler states of an operation that passes over next to nothing. small_seconds: what it takes.
    """

    product_share: float = 0.0
    moving_share: float = 0.0
    least_seconds: float = 0.0
    small_seconds: float = 0.0


@dataclass(frozen=True)
class Rates:
    """All that was measured.

    Attributes:
        products: type of the weights → FLOP/s of one device by rows, weights coming from memory.
        memory: bytes/s that one device reads while all others do too.
        types: type of the activations → rates. collectives: by kind and number of devices.
        devices: how many worked at once; devices of a CPU share it, so its rates hold for that many alone.
        device_kind, date, jax: of what, when, and with which version of jax.
        error: median relative error with which these rates give back the times of the steps that they were fitted to.
        spread: what was repeated → half the distance of its quartiles over its median.
        pace: against the compiler's account; None in a file that was written before that was measured.
    """

    products: tuple[tuple[str, Curve], ...]
    memory: float
    types: tuple[tuple[str, TypeRates], ...]
    collectives: tuple[CollectiveRate, ...]
    devices: int
    device_kind: str
    date: str
    jax: str
    error: float
    spread: tuple[tuple[str, float], ...] = ()
    pace: PaceRates | None = None

    def product(self, weights: str) -> Curve:
        """FLOP/s by rows, for weights of a type.

        Raises:
            InvalidInput: a type that was not measured.
        """
        return _of(self.products, weights)

    def type(self, activations: str) -> TypeRates:
        """Rates where activations have this type.

        Raises:
            InvalidInput: a type that was not measured.
        """
        return _of(self.types, activations)

    def collective(self, op: str, ways: int) -> tuple[float, float]:
        """Seconds and factor of a kind of collective among so many devices: as measured, between and beyond in proportion to log ways.
        Where no permute was measured, it has those of an all-gather, which sends as much through the same links.

        Raises:
            InvalidInput: a kind that was not measured.
        """
        known = sorted((rate for rate in self.collectives if rate.op == op), key=lambda rate: rate.ways)
        if not known and op == _PERMUTE:
            return self.collective(_ALL_GATHER, ways)
        if not known:
            raise InvalidInput(f"the hardware file has no rates of {op}; measure again with partinf calibrate, on all devices")
        if len(known) == 1 or ways <= known[0].ways:
            return known[0].seconds, known[0].factor
        above = min(bisect_right([rate.ways for rate in known], ways), len(known) - 1)
        low, high = known[above - 1], known[above]
        share = math.log(ways / low.ways) / math.log(high.ways / low.ways)
        seconds, factor = low.seconds + share * (high.seconds - low.seconds), low.factor + share * (high.factor - low.factor)
        return max(seconds, 0.0), max(factor, 0.0)


def _of(table: tuple[tuple[str, T], ...], name: str) -> T:
    for key, value in table:
        if key == name:
            return value
    raise InvalidInput(
        f"the hardware file has no rates for {name}, only for {', '.join(key for key, _ in table)}; partinf calibrate --types measures them"
    )
