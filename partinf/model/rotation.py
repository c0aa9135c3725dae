"""How queries and keys are rotated by their positions: the frequency of every pair of dimensions, for every published way of scaling them.

A position p turns pair i of a head by the angle p·f_i, where f_i = theta^(-2i/D) over the D leading dimensions that are rotated (Su et
al., RoFormer, 2021). What is scaled are these frequencies, so that positions beyond those of the training stay within the angles that the
model has seen. Two of the ways depend on how long contexts are: they are fixed by the longest context that is served, because keys are
cached as they were rotated. `Rotation.chosen_by` says so in words.

Pairs are (i, i + D/2). Families that pair neighbours instead (0 with 1, 2 with 3) have their rows permuted while they are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from enum import StrEnum
from typing import Any, ClassVar, Protocol

from partinf.foundation.documents import Table, finite, shown
from partinf.foundation.limits import not_whole

_THETA = (1.0, 1e30)
_FACTOR = (2.0**-20, 2.0**30)
MOST_POSITIONS = 1 << 30
_MOST_DIMS = 1 << 14


class Scaling(Protocol):
    """One way of scaling frequencies; `name` is how files call it."""

    name: ClassVar[str]

    def frequencies(self, theta: float, dims: int, served: int) -> tuple[float, ...]:
        """Radians per position of each of the dims/2 pairs, where contexts have up to `served` tokens."""

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""

    def chosen_by(self, served: int) -> str:
        """What the longest context that is served decides, in words; empty where it decides nothing."""

    def offences(self, theta: float, dims: int) -> Iterator[str]:
        """What is wrong with its numbers, where so many dimensions are rotated with this theta."""


@dataclass(frozen=True)
class Linear:
    """All positions divided by `factor`."""

    factor: float

    name: ClassVar[str] = "linear"
    amplitude: ClassVar[float] = 1.0

    def frequencies(self, theta: float, dims: int, served: int) -> tuple[float, ...]:
        return tuple(f / self.factor for f in _plain(theta, dims))

    def chosen_by(self, served: int) -> str:
        return ""

    def offences(self, theta: float, dims: int) -> Iterator[str]:
        yield from _number("factor", self.factor)


@dataclass(frozen=True)
class Llama3:
    """Wavelengths beyond original_max_len/low_freq_factor are stretched by `factor`, those below original_max_len/high_freq_factor are
    kept, and those between are interpolated (Grattafiori et al., The Llama 3 Herd of Models, 2024)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int

    name: ClassVar[str] = "llama3"
    amplitude: ClassVar[float] = 1.0

    def frequencies(self, theta: float, dims: int, served: int) -> tuple[float, ...]:
        def scaled(f: float) -> float:
            cycles = self.original_max_len * f / (2 * math.pi)
            keep = _clip((cycles - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor))
            return keep * f + (1 - keep) * f / self.factor

        return tuple(map(scaled, _plain(theta, dims)))

    def chosen_by(self, served: int) -> str:
        return ""

    def offences(self, theta: float, dims: int) -> Iterator[str]:
        found = [
            *_number("factor", self.factor),
            *_number("low_freq_factor", self.low_freq_factor),
            *_number("high_freq_factor", self.high_freq_factor),
            *not_whole("original_max_len", self.original_max_len, 1, MOST_POSITIONS),
        ]
        if not found and not self.low_freq_factor < self.high_freq_factor:
            found = [f"low_freq_factor = {self.low_freq_factor}; it must be below high_freq_factor = {self.high_freq_factor}"]
        yield from found


@dataclass(frozen=True)
class Yarn:
    """Pairs that turn more than `beta_fast` times within the original context are kept, those that turn less than `beta_slow` times are
    divided by `factor`, and those between are interpolated by their number (Peng et al., YaRN, 2023).

    Attributes:
        attention_factor: of cosines and sines; 0 for 0.1·ln(factor) + 1, as the paper has it.
        truncate: whether the two limits are rounded outwards to whole pairs.
    """

    factor: float
    original_max_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True

    name: ClassVar[str] = "yarn"

    @property
    def amplitude(self) -> float:
        return self.attention_factor or yarn_amplitude(self.factor)

    def frequencies(self, theta: float, dims: int, served: int) -> tuple[float, ...]:
        def pair_that_turns(times: float) -> float:
            return dims * math.log(self.original_max_len / (times * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        width = high - low or 0.001

        def scaled(pair: int, f: float) -> float:
            stretched = _clip((pair - low) / width)
            return stretched * f / self.factor + (1 - stretched) * f

        return tuple(scaled(pair, f) for pair, f in enumerate(_plain(theta, dims)))

    def chosen_by(self, served: int) -> str:
        return ""

    def offences(self, theta: float, dims: int) -> Iterator[str]:
        for key in ("factor", "beta_fast", "beta_slow"):
            yield from _number(key, getattr(self, key))
        yield from _number("attention_factor", self.attention_factor, least=0.0)
        if theta <= 1:
            yield f"yarn scaling needs a theta above 1, found {theta:g}"
        yield from not_whole("original_max_len", self.original_max_len, 1, MOST_POSITIONS)


@dataclass(frozen=True)
class LongRope:
    """A factor of its own for every pair: `short_factor` where contexts end within the original length, else `long_factor` (Ding et al.,
    LongRoPE, 2024). `attention_factor` multiplies cosines and sines with both."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_len: int
    attention_factor: float = 1.0

    name: ClassVar[str] = "longrope"

    @property
    def amplitude(self) -> float:
        return self.attention_factor

    def _factors(self, served: int) -> tuple[float, ...]:
        return self.long_factor if served > self.original_max_len else self.short_factor

    def frequencies(self, theta: float, dims: int, served: int) -> tuple[float, ...]:
        return tuple(f / factor for f, factor in zip(_plain(theta, dims), self._factors(served), strict=True))

    def chosen_by(self, served: int) -> str:
        which, order = ("long", "above") if served > self.original_max_len else ("short", "within")
        return f"contexts of up to {served:,} tokens, {order} the original {self.original_max_len:,}: the {which} factors of LongRoPE"

    def offences(self, theta: float, dims: int) -> Iterator[str]:
        for key in ("short_factor", "long_factor"):
            factors = getattr(self, key)
            if len(factors) != dims // 2:
                yield f"{key} has {len(factors)} factors; one for each of the {dims // 2} rotated pairs is needed"
            yield from (line for factor in factors for line in _number(key, factor))
        yield from _number("attention_factor", self.attention_factor)
        yield from not_whole("original_max_len", self.original_max_len, 1, MOST_POSITIONS)


@dataclass(frozen=True)
class Dynamic:
    """A larger theta where contexts are longer than the original, so that the slowest pair turns by no more than it did (neural tangent
    kernel scaling, after u/bloc97 and u/emozilla, 2023)."""

    factor: float
    original_max_len: int

    name: ClassVar[str] = "dynamic"
    amplitude: ClassVar[float] = 1.0

    def _theta(self, theta: float, dims: int, served: int) -> float:
        stretch = self.factor * max(served, self.original_max_len) / self.original_max_len - (self.factor - 1)
        return theta * stretch ** (dims / (dims - 2))

    def frequencies(self, theta: float, dims: int, served: int) -> tuple[float, ...]:
        return _plain(self._theta(theta, dims, served), dims)

    def chosen_by(self, served: int) -> str:
        if served <= self.original_max_len:
            return f"contexts of up to {served:,} tokens, within the original {self.original_max_len:,}: frequencies as trained"
        return f"contexts of up to {served:,} tokens, above the original {self.original_max_len:,}: frequencies of that length for all"

    def offences(self, theta: float, dims: int) -> Iterator[str]:
        yield from _number("factor", self.factor)
        yield from not_whole("original_max_len", self.original_max_len, 1, MOST_POSITIONS)
        if dims < 4:
            yield f"dynamic scaling needs at least 4 rotated dimensions, found {dims}"


class Scaled(StrEnum):
    """The names of what scales frequencies."""

    LINEAR = Linear.name
    LLAMA3 = Llama3.name
    YARN = Yarn.name
    LONGROPE = LongRope.name
    DYNAMIC = Dynamic.name


SCALINGS: Mapping[str, type[Any]] = {one.name: one for one in (Linear, Llama3, Yarn, LongRope, Dynamic)}


@dataclass(frozen=True)
class Rotation:
    """How one kind of layer rotates its queries and keys.

    Attributes:
        theta: the ratio of the longest wavelength to the shortest, nearly.
        dims: leading dimensions of a head that are rotated, the others being left as they are; 0 for all.
        scaling: how frequencies are scaled; None where they are not.
        query_growth, growth_every: queries at position p are multiplied by 1 + query_growth·ln(1 + ⌊p / growth_every⌋), so that many keys
            do not flatten the softmax; 0 for no growth.
    """

    theta: float = 10_000.0
    dims: int = 0
    scaling: Scaling | None = None
    query_growth: float = 0.0
    growth_every: int = 0

    def rotated(self, head_dim: int) -> int:
        """Dimensions of a head of this size that are rotated."""
        return self.dims or head_dim

    def frequencies(self, head_dim: int, served: int) -> tuple[float, ...]:
        """Radians per position of each rotated pair.

        Args:
            served: the longest context, in tokens, that the deployment serves.
        """
        dims = self.rotated(head_dim)
        return _plain(self.theta, dims) if self.scaling is None else self.scaling.frequencies(self.theta, dims, served)

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by: scores grow by its square."""
        return 1.0 if self.scaling is None else self.scaling.amplitude

    def chosen_by(self, served: int) -> str:
        """What the longest context that is served decides, in words; empty where it decides nothing."""
        return "" if self.scaling is None else self.scaling.chosen_by(served)

    def longest(self, max_len: int) -> int:
        """The longest context of a model that states one of `max_len` tokens, which may be that of its training before it was stretched."""
        match self.scaling:
            case Yarn(factor=factor, original_max_len=trained) | Dynamic(factor=factor, original_max_len=trained):
                return max(max_len, int(min(factor * min(trained, MOST_POSITIONS), MOST_POSITIONS))) if max_len else 0
        return max_len

    def trained(self, max_len: int) -> int:
        """The context that a model states whose longest is this one: the inverse of `longest` where they differ in the result."""
        return self.scaling.original_max_len if isinstance(self.scaling, Dynamic) else max_len

    def offences(self, head_dim: int) -> list[str]:
        """What is wrong with it in a head of this size."""
        found = [*_number("theta", self.theta, *_THETA), *not_whole("dims", self.dims, 0, _MOST_DIMS)]
        found += _number("query_growth", self.query_growth, least=0.0)
        found += not_whole("growth_every", self.growth_every, 0, MOST_POSITIONS)
        if not found and (self.query_growth > 0) != (self.growth_every > 0):
            found = [f"query_growth = {self.query_growth:g} and growth_every = {self.growth_every}; either needs the other"]
        if found:
            return found
        dims = self.rotated(head_dim)
        if dims % 2:
            return [
                f"rotary positions need an even head_dim, found {dims}" if not self.dims else f"dims = {dims}; pairs need an even number"
            ]
        if dims > head_dim:
            return [f"dims = {dims}; a head has {head_dim}"]
        return found if self.scaling is None else list(self.scaling.offences(self.theta, dims))


PLAIN = Rotation()


def yarn_amplitude(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by where a context is stretched by `factor`: 0.1·weight·ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def rotation_from(table: Table) -> Rotation:
    """A rotation as a TOML table has it: `theta`, `dims`, the name of the `scaling`, and that scaling's own numbers."""
    theta, dims = table.number("theta", default=Rotation.theta), table.whole("dims", default=0)
    name = table.choice("scaling", Scaled, default=None)
    scaling = None
    if name is not None:
        scaling = SCALINGS[name](**{one.name: _read(table, one) for one in fields(SCALINGS[name])})
    growth, every = table.number("query_growth", default=0.0), table.whole("growth_every", default=0)
    table.refuse_unknown()
    return Rotation(theta, dims, scaling, growth, every)


def rotation_to(rotation: Rotation) -> dict[str, Any]:
    """What `rotation_from` reads, defaults left out."""
    found: dict[str, Any] = {} if rotation.theta == Rotation.theta else {"theta": rotation.theta}
    found |= {"dims": rotation.dims} if rotation.dims else {}
    found |= {"query_growth": rotation.query_growth, "growth_every": rotation.growth_every} if rotation.query_growth else {}
    if rotation.scaling is not None:
        found |= {"scaling": rotation.scaling.name}
        found |= {one.name: getattr(rotation.scaling, one.name) for one in fields(SCALINGS[rotation.scaling.name])}
    return found


def _read(table: Table, one: Field[Any]) -> Any:
    default = {} if one.default is MISSING else {"default": one.default}
    if one.type == "tuple[float, ...]":
        return table.numbers(one.name)
    return {"int": table.whole, "float": table.number, "bool": table.flag}[str(one.type)](one.name, **default)


def _plain(theta: float, dims: int) -> tuple[float, ...]:
    return tuple(theta ** (-pair / dims) for pair in range(0, dims, 2))


def _clip(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def _number(key: str, value: Any, least: float = _FACTOR[0], most: float = _FACTOR[1]) -> list[str]:
    number = finite(value)
    if number is not None and least <= number <= most:
        return []
    return [f"{key} = {shown(value)}; a number from {least:.3g} to {most:.3g} is needed"]
