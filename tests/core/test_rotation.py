"""Rotations: the frequencies that transformers computes, and what decides them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from partinf.model.hf_file import HfFile
from partinf.model.hf_rope import Rope, RopeReader, rope_to_hf
from partinf.model.rotation import Dynamic, Linear, Llama3, LongRope, Rotation, Yarn
from partinf.transformer.rope import angles, rotate

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "fixtures" / "rotations.json").read_text())["cases"]
PARTIAL = Rope(partial=1.0)


def read(data: dict[str, Any]) -> Rotation:
    file = HfFile(data, "config.json")
    found = RopeReader(file, PARTIAL, data["head_dim"], data["max_position_embeddings"]).rotation()
    assert file.offences == []
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['file']['rope_parameters']['rope_type']}-{case['served']}")
def test_frequencies_are_those_of_transformers(case: dict[str, Any]) -> None:
    """Within what float32, in which transformers computes them, can tell apart."""
    head_dim = case["file"]["head_dim"]
    rotation = read(case["file"])
    np.testing.assert_allclose(rotation.frequencies(head_dim, case["served"]), case["frequencies"], rtol=1e-6)
    assert math.isclose(rotation.amplitude, case["amplitude"], rel_tol=1e-12)
    again = read(case["file"] | rope_to_hf(rotation, head_dim, case["file"]["max_position_embeddings"]))
    assert again.frequencies(head_dim, case["served"]) == rotation.frequencies(head_dim, case["served"])
    assert math.isclose(again.amplitude, rotation.amplitude, rel_tol=1e-12)


def test_the_fixture_has_every_way_of_scaling() -> None:
    found = {type(read(case["file"]).scaling) for case in CASES}
    assert found == {Linear, Llama3, Yarn, LongRope, Dynamic}


def test_what_the_longest_context_decides_is_reported() -> None:
    long = Rotation(scaling=LongRope((1.0, 1.0), (2.0, 3.0), 4096))
    assert long.chosen_by(4096) == "contexts of up to 4,096 tokens, within the original 4,096: the short factors of LongRoPE"
    assert long.chosen_by(4097) == "contexts of up to 4,097 tokens, above the original 4,096: the long factors of LongRoPE"
    assert long.frequencies(4, 4097)[1] == pytest.approx(long.frequencies(4, 4096)[1] / 3)
    dynamic = Rotation(scaling=Dynamic(2.0, 32))
    assert "frequencies as trained" in dynamic.chosen_by(32)
    assert "frequencies of that length for all" in dynamic.chosen_by(33)
    assert Rotation(scaling=Linear(2.0)).chosen_by(10**6) == Rotation().chosen_by(10**6) == ""


def test_only_the_leading_dimensions_turn_and_the_amplitude_multiplies_them() -> None:
    rotation = Rotation(dims=4, scaling=Yarn(4.0, 32, attention_factor=1.5))
    x = np.random.default_rng(0).normal(size=(3, 2, 10)).astype(np.float32)
    turned = np.asarray(rotate(jnp.asarray(x), angles(jnp.arange(3), rotation, 10, 64)))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    pairs = x[..., :2] + 1j * x[..., 2:4]
    by = 1.5 * np.exp(1j * np.arange(3)[:, None] * np.asarray(rotation.frequencies(10, 64)))
    expected = pairs * by[:, None]
    np.testing.assert_allclose(turned[..., :2] + 1j * turned[..., 2:4], expected, atol=1e-6)


@pytest.mark.parametrize(
    "rotation, words",
    [
        (Rotation(dims=3), "dims = 3; pairs need an even number"),
        (Rotation(dims=10), "dims = 10; a head has 8"),
        (Rotation(theta=0.5), "theta = 0.5; a number from 1 to 1e+30 is needed"),
        (Rotation(dims=2, scaling=Dynamic(2.0, 8)), "dynamic scaling needs at least 4 rotated dimensions, found 2"),
        (Rotation(scaling=Linear(math.inf)), "factor = inf; a number from"),
    ],
)
def test_refused(rotation: Rotation, words: str) -> None:
    (line,) = rotation.offences(8)
    assert words in line
