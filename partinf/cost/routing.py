"""What a router sends where, as expectations: how many experts a batch hits, how many rows an expert's device gets, and the most that any
device gets of either.

A step waits for its slowest device. Of T tokens every one chooses k of X experts, which lie in equal blocks on G devices; with several
groups of tokens, each chooses for itself. Under uniform routing a device's rows are a sum over tokens of hypergeometric numbers,

    mean T·k/G,  variance T·(k/G)·(1 - 1/G)·(X - k)/(X - 1),

and an expert is hit by one of T tokens with probability 1 - (1 - k/X)^T. The greatest of several devices' numbers is taken as that of
independent ones with the same mean and variance (binomial, Poisson or negative binomial, whichever has them; normal where they are large),
and its distance from the mean is widened by √(1 - ρ), for the numbers of two devices are correlated by ρ < 0: what one has the others have
not. For two devices that is exact.

Routers of trained models are not uniform. `skew` is the exponent α of a power law from which the experts' shares are drawn: densities
∝ x^(-α) between 1 and `_SPREAD`. NVIDIA's AIConfigurator measures experts under such loads, with α = 1.01 as it was seen in DeepSeek R1 and
1.2 in Qwen3-235B-A22B on certain data (its collector's notes on power laws, November 2025; the range there grows with the batch and is
that of some thousand tokens here). Popular experts lie anywhere, so blocks of experts differ by chance, as in drawing without replacement.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

MOST_SKEW = 3.0  # beyond it a few experts would have nearly all rows
_SPREAD = 1000.0  # the most popular expert against the least
_LARGE = 12.0  # deviations from which counts are as good as normal
_TAIL = 9.0  # deviations that are looked at


def skew_offences(skew: float, model: str, experts: bool) -> list[str]:
    """What is wrong with a skew that somebody asks for.

    Args:
        experts: whether the model of this name has any.
    """
    if not 0.0 <= skew <= MOST_SKEW:
        return [f"routing-skew {skew:g}: a number is needed, from 0 (uniform routing) to {MOST_SKEW:g}"]
    return [f"routing-skew {skew:g}: model {model} has no experts, so nothing is routed; leave it out"] if skew and not experts else []


class Routed(NamedTuple):
    """What the devices that hold experts are expected to get in one layer.

    Attributes:
        hit: experts of one device that some row chose, in the mean; most_hit: on the device with most of them.
        rows: rows of one device, one for each expert that a token chose there; most_rows: on the device with most of them.
        sent: rows that a device sends to others, or is sent, where exactly the wanted ones are exchanged; 0 elsewhere.
    """

    hit: float
    most_hit: float
    rows: float
    most_rows: float
    sent: float = 0.0


@functools.lru_cache(maxsize=64)
def popularity(count: int, per_token: int, skew: float) -> tuple[float, ...]:
    """The probability with which a token chooses each expert, the least popular first; they sum to `per_token`."""
    if not skew:
        return (per_token / count,) * count
    shares = [_quantile((index + 0.5) / count, skew) for index in range(count)]
    kept, left, capped = sum(shares), float(per_token), 0
    while left * shares[count - 1 - capped] > kept:  # no token chooses an expert twice
        kept, left, capped = kept - shares[count - 1 - capped], left - 1.0, capped + 1
    return tuple(left * share / kept for share in shares[: count - capped]) + (1.0,) * capped


def _quantile(part: float, skew: float) -> float:
    """What this part of all draws from the power law stays below."""
    if abs(skew - 1.0) < 1e-6:
        return _SPREAD**part
    return (1.0 + part * (_SPREAD ** (1.0 - skew) - 1.0)) ** (1.0 / (1.0 - skew))


@functools.lru_cache(maxsize=1 << 14)
def routed(count: int, per_token: int, tokens: int, shards: int, groups: int = 1, skew: float = 0.0) -> Routed:
    """Of `count` experts in so many shards, when each of `tokens` tokens chooses `per_token` of them.

    Args:
        groups: of as many tokens, each with devices of its own for all shards.
    """
    chosen = popularity(count, per_token, skew)
    hit = [1.0 - (1.0 - p) ** tokens for p in chosen] if skew else [1.0 - (1.0 - per_token / count) ** tokens] * count
    mean, held = tokens * per_token / shards, count // shards
    spread, per_pair = tokens * _fixed_size(chosen) / shards * (1.0 - 1.0 / shards), _pair(count, per_token, tokens)
    placed = tokens * tokens * _placement(chosen, shards)
    # One device holds the most popular expert, and some device at least the mean.
    popular = tokens * (chosen[-1] + (held - 1) * (per_token - chosen[-1]) / max(count - 1, 1))
    least = max(float(math.ceil(mean - 1e-9)), popular)
    rows = _Count(mean, spread + placed, least, float(tokens * min(per_token, held)), -1.0 / max(shards - 1, 1))
    alone = sum(one * (1.0 - one) for one in hit)
    share = alone / (count * hit[0] * (1.0 - hit[0])) if not skew and 0.0 < hit[0] < 1.0 else 1.0 if not skew else 0.0
    placed, mean_hit = _placement(hit, shards), sum(hit) / shards
    variance = alone / shards + share * held * (held - 1) * per_pair + placed
    between = share * held * held * per_pair - placed / max(shards - 1, 1)
    least, correlation = float(min(math.ceil(per_token / shards), held)), between / variance if variance > 0 else 0.0
    hits = _Count(mean_hit, variance, least, float(held), correlation)
    devices = shards * groups
    return Routed(mean_hit, hits.greatest(shards, devices), mean, rows.greatest(shards, devices))


def expected_sent(count: int, per_token: int, tokens: int, shards: int) -> float:
    """Rows of `tokens` tokens that go to one of so many shards, because one of the token's experts is there, under uniform routing."""
    others = count - count // shards
    none = math.prod((others - i) / (count - i) for i in range(per_token))
    return tokens * (1.0 - none)


def _fixed_size(chosen: tuple[float, ...]) -> float:
    """Σ p(1 - p), as it is where every token chooses the same number of experts (exact where all p are equal)."""
    count = len(chosen)
    return sum(p * (1.0 - p) for p in chosen) * count / max(count - 1, 1)


def _pair(count: int, per_token: int, tokens: int) -> float:
    """The covariance of two experts' being hit."""
    if count < 2:
        return 0.0
    missed = 1.0 - per_token / count
    return (missed * max(0.0, 1.0 - per_token / (count - 1))) ** tokens - missed ** (2 * tokens)


def _placement(values: tuple[float, ...] | list[float], shards: int) -> float:
    """The variance of the sum of a random part of these values."""
    count = len(values)
    mean = sum(values) / count
    each = sum((value - mean) ** 2 for value in values) / max(count - 1, 1)
    return count / shards * (1.0 - 1.0 / shards) * each


class _Count(NamedTuple):
    """A number that every device has: its mean and variance, its range, and how the numbers of two devices of a group correlate."""

    mean: float
    variance: float
    least: float
    most: float
    correlation: float

    def greatest(self, shards: int, devices: int) -> float:
        """The expectation of the greatest of so many devices' numbers, `shards` of which belong together."""
        deviation = math.sqrt(max(self.variance, 0.0))
        if devices == 1 or deviation < 1e-9 * max(self.mean, 1.0):
            return min(self.mean, self.most)
        if deviation >= _LARGE:
            beyond = deviation * _greatest_normal(devices)
        else:
            beyond = sum(_least_of_most(self.mean, self.variance, self.most, devices)) - self.mean
        widened = beyond * math.sqrt(1.0 - self.correlation) if shards > 1 else beyond
        return min(max(self.mean + widened, self.least), self.most)


def _least_of_most(mean: float, variance: float, most: float, devices: int) -> Iterator[float]:
    """P(the greatest > n) for n = 0, 1, 2, …, of whole numbers of this mean and variance."""
    reach = _TAIL * math.sqrt(variance)
    log_of, below, last = _log_mass(mean, variance), 0.0, min(most, math.ceil(mean + reach + 4.0))
    first = max(0, math.floor(mean - reach))
    yield float(first)
    number = first
    while number < last:
        below += math.exp(log_of(number))
        yield 1.0 - min(below, 1.0) ** devices
        number += 1


class _Binomial(NamedTuple):
    trials: float
    chance: float

    def __call__(self, number: int) -> float:
        n, p = self.trials, self.chance
        if number > n:
            return -math.inf
        ways = math.lgamma(n + 1.0) - math.lgamma(number + 1.0) - math.lgamma(n - number + 1.0)
        return ways + number * math.log(p) + (n - number) * math.log1p(-p)


class _Poisson(NamedTuple):
    mean: float

    def __call__(self, number: int) -> float:
        return number * math.log(self.mean) - self.mean - math.lgamma(number + 1.0)


class _NegativeBinomial(NamedTuple):
    size: float
    chance: float

    def __call__(self, number: int) -> float:
        r, p = self.size, self.chance
        ways = math.lgamma(r + number) - math.lgamma(number + 1.0) - math.lgamma(r)
        return ways + r * math.log(p) + number * math.log1p(-p)


def _log_mass(mean: float, variance: float) -> _Binomial | _Poisson | _NegativeBinomial:
    """The logarithm of the probability of a whole number, under the distribution of counts with this mean and variance."""
    ratio = variance / mean
    if ratio < 0.999:
        return _Binomial(mean / (1.0 - ratio), 1.0 - ratio)
    return _Poisson(mean) if ratio < 1.001 else _NegativeBinomial(mean / (ratio - 1.0), 1.0 / ratio)


@functools.lru_cache(maxsize=1 << 10)
def _greatest_normal(devices: int) -> float:
    """The expectation of the greatest of so many standard normal numbers, by steps of a tenth, which is exact for so smooth an
    integral."""
    step, total = 0.1, 0.0
    for index in range(-80, 80):
        point = (index + 0.5) * step
        below = 0.5 * math.erfc(-point / math.sqrt(2.0))
        total += step * ((1.0 - below**devices) if point > 0 else -(below**devices))
    return total
