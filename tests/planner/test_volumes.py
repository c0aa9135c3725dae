"""Communication volumes of the two-matrix FFN (Pope et al., section 3.2), exactly: closed forms equal the ledger's sums."""

from __future__ import annotations

from fractions import Fraction

import pytest

from partinf.cost.ffn import ffn_entries
from partinf.cost.items import What
from partinf.cost.split import StepShape
from partinf.hardware.slices import parse_slice
from partinf.model.config import ModelConfig
from tests.planner.support import layout_of, moved_elements, split_of

E, F, N = 18432, 73728, 64
MLP = ModelConfig("two-matrix", 1, E, F, 64, 1, 256, 4096, gated=False)
ONE_D = {"x": "ffn", "y": "ffn", "z": "ffn"}
TWO_D = {"x": "embed", "y": "ffn", "z": "ffn"}


def volume(storage: dict[str, str], gather: str, tokens: int, mesh: str = "v4:4x4x4", axes: str | None = None) -> float:
    """Elements per chip that the ledger moves for one FFN."""
    slice_ = parse_slice(mesh, axes)
    split = split_of(MLP, slice_, layout_of(storage, "none", gather), StepShape(prefill_tokens=tokens, prefill_slots=1))
    entries = [entry for entry in ffn_entries(split) if entry.item.what is not What.NORM]
    return moved_elements(entries, slice_.axis_sizes)


def weight_stationary(tokens: int, x: int, n: int = N) -> Fraction:
    """2·BL·[(E/X)(YZ-1)/YZ + (F/YZ)(X-1)/X]; 1D is X = 1."""
    yz = n // x
    return 2 * tokens * (Fraction(E, x) * Fraction(yz - 1, yz) + Fraction(F, yz) * Fraction(x - 1, x))


def weight_gathered(tokens: int, gathered: int, n: int = N) -> Fraction:
    """2EF·(N/n)(N-1)/N for the weights + 2BL·(E/N)·(n/N-1)/(n/N) for the activations."""
    rest = Fraction(n, gathered)
    weights = 2 * E * F * Fraction(gathered, n) * Fraction(gathered - 1, gathered)
    return weights + 2 * tokens * Fraction(E, gathered) * (rest - 1) / rest


@pytest.mark.parametrize("tokens", [64, 4096, 1 << 20])
def test_closed_forms_equal_the_ledger(tokens: int) -> None:
    assert volume(ONE_D, "", tokens) == weight_stationary(tokens, 1)
    assert volume(TWO_D, "", tokens) == weight_stationary(tokens, 4)
    for gather, ways in (("x", 4), ("xy", 16), ("xyz", 64)):
        assert volume(TWO_D, gather, tokens) == weight_gathered(tokens, ways)


@pytest.mark.parametrize(
    ("before", "after", "tokens"), [("", "x", 18_432), ("x", "xy", 73_728), ("xy", "xyz", 1_179_648)], ids=["WG-X", "WG-XY", "WG-XYZ"]
)
def test_crossovers_in_tokens(before: str, after: str, tokens: int) -> None:
    """Volumes are linear in the tokens, so two samples of each give the crossing exactly."""

    def line(gather: str) -> tuple[Fraction, Fraction]:
        low, high = (Fraction(volume(TWO_D, gather, t)) for t in (64, 128))
        return (high - low) / 64, 2 * low - high

    (slope, start), (other_slope, other_start) = line(before), line(after)
    assert (other_start - start) / (slope - other_slope) == tokens


def test_best_x_is_four_on_64_chips() -> None:
    """X = ½·sqrt(n) for F = 4E; the ledger agrees on every factorisation."""
    volumes = {}
    for x in (1, 2, 4, 8, 16, 32, 64):
        mesh = f"a:{x},b:{N // x}"
        volumes[x] = volume({"a": "embed", "b": "ffn"}, "", 512, "cpu:64", mesh)
        assert volumes[x] == weight_stationary(512, x)
    assert min(volumes, key=lambda x: volumes[x]) == 4


def test_two_dimensional_wins_above_sixteen_chips_by_volume() -> None:
    """With F = 4E and X = ½·sqrt(n) the two are level at n = 16 for large n's sake: 8BLE/sqrt(n) = 2BLE."""
    assert 8 * E / 16**0.5 == 2 * E
    assert weight_stationary(512, 4) < weight_stationary(512, 1)
