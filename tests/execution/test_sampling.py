"""Choosing tokens from a split vocabulary: thresholds and penalties against plain twins, choices that depend on neither mesh nor batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from partinf.engine.params import MAX_TEMPERATURE
from partinf.transformer.batch import ENDS_LATER, ExtendedBatch, SamplingBatch
from partinf.transformer.kernels import cpu as cpu_kernels
from partinf.transformer.sampling import _uniform, choose, keep, keep_plain, log_normalizer, logit_of, most_likely
from partinf.transformer.slots import ENDS, PROMPTED, Slots, adjust_logits, adjust_logits_plain, count_fed

VOCAB = 64


def sampling(rows: int, **values: object) -> SamplingBatch:
    fields = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "sample": 0, "position": 0} | values
    types = {"temperature": np.float32, "top_p": np.float32, "min_p": np.float32, "seed": np.uint32}
    return SamplingBatch(**{key: np.broadcast_to(np.asarray(value, types.get(key, np.int32)), (rows,)) for key, value in fields.items()})


def choose_over(
    ways: int, logits: np.ndarray, how: SamplingBatch, random: bool = True, native: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens chosen with the vocabulary split over so many devices, and their log-probabilities."""
    mesh = Mesh(np.array(jax.devices()[:ways]), ("x",), axis_types=(AxisType.Auto,))
    axes = ("x",) if ways > 1 else ()

    def local(part: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = choose(part, ids, how, axes, jnp.any(jnp.asarray(how.temperature) > 0) if random else None, native)
        return tokens, logit_of(part, ids, tokens, axes, native) - log_normalizer(part, axes, native)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(None, "x"), P("x")), out_specs=(P(), P()), check_vma=False)
    tokens, logprobs = jax.jit(mapped)(logits, jnp.arange(VOCAB))
    return np.asarray(tokens), np.asarray(logprobs)


@pytest.mark.skipif("not cpu_kernels.available()", reason="no C++ compiler")
@pytest.mark.parametrize("ways", [1, 2])
def test_the_kernel_for_cpus_finds_what_xla_finds(ways: int) -> None:
    logits = random_logits(9)
    logits[1, 3], logits[2, 5], logits[3], logits[4, 7], logits[5, : VOCAB - 2] = np.nan, np.inf, -np.inf, -np.inf, -np.inf
    logits[6, [2, VOCAB - 1]], logits[7] = 50.0, 0.0  # two alike, and all
    how = sampling(9, temperature=0.0)
    (tokens, logprobs), (want, want_logprobs) = (choose_over(ways, logits, how, random=False, native=native) for native in (True, False))
    np.testing.assert_array_equal(tokens, want)
    np.testing.assert_allclose(logprobs, want_logprobs, rtol=2e-6, atol=1e-6)
    assert np.isnan(logprobs[[1, 2, 3]]).all()
    top, place, mass = cpu_kernels.logit_ends(jnp.asarray(logits[4:, :61]))  # what fills no whole vector
    np.testing.assert_array_equal(top, logits[4:, :61].max(axis=1))
    assert np.asarray(place)[[1, 2, 3]].tolist() == [0, 2, 0]
    np.testing.assert_allclose(
        np.asarray(mass)[3:], np.exp(logits[7:, :61] - logits[7:, :61].max(axis=1, keepdims=True)).sum(axis=1), rtol=1e-6
    )


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32) * 3


def below_top(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature


keep_whole = jax.jit(lambda logits, k, p, m: keep(logits, below_top(logits), k, p, m, lambda x: x))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.003, 0.1, 0.7, 1.0]),
    ties=st.booleans(),
)
def test_thresholds_equal_the_sorted_twin(seed: int, top_k: int, top_p: float, min_p: float, ties: bool) -> None:
    logits = random_logits(4, seed)
    if ties:
        logits = np.round(logits)
    how = jnp.full(4, top_k, jnp.int32), jnp.full(4, top_p, jnp.float32), jnp.full(4, min_p, jnp.float32)
    ours, twin = np.asarray(keep_whole(logits, *how)), np.asarray(keep_plain(jnp.asarray(logits), below_top(jnp.asarray(logits)), *how))
    for row, a, b in zip(logits, ours, twin, strict=True):
        if (a != b).any():  # only where the mass of the smaller set meets top_p within rounding
            survivors = row >= np.sort(row)[-top_k] if 0 < top_k < VOCAB else np.ones(VOCAB, bool)
            survivors &= np.exp(row - row.max()) >= min_p
            mass = np.exp(row.astype(np.float64)) * survivors
            assert mass[a & b].sum() / mass.sum() == pytest.approx(top_p, abs=1e-6)


def test_thresholds_by_hand() -> None:
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))

    def kept(k: int, p: float, m: float = 0.0) -> list[bool]:
        return np.asarray(keep_whole(logits, jnp.asarray([k]), jnp.asarray([p], jnp.float32), jnp.asarray([m], jnp.float32)))[0].tolist()

    assert kept(0, 1.0) == [True] * 4
    assert kept(2, 1.0) == [True, True, False, False]
    assert kept(0, 0.6) == [True, True, False, False]
    assert kept(0, 0.4) == [True, False, False, False]
    assert kept(2, 0.9) == [True, True, False, False]  # 0.9 of the mass of the two that are left
    assert kept(0, 1.0, 0.2) == [True, True, True, False]  # at least 0.2 · 0.5
    assert kept(0, 0.8, 0.2) == [True, True, False, False]  # 0.5 + 0.3 of 0.95


def test_choices_do_not_depend_on_the_mesh() -> None:
    logits = random_logits(16)
    how = sampling(16, temperature=0.8, top_k=np.arange(16), top_p=0.9, seed=np.arange(16), position=3)
    one, eight = choose_over(1, logits, how), choose_over(8, logits, how)
    np.testing.assert_array_equal(one[0], eight[0])
    np.testing.assert_allclose(one[1], eight[1], rtol=1e-5)


def test_choices_do_not_depend_on_the_batch() -> None:
    logits = np.repeat(random_logits(1), 12, axis=0)
    seeds = np.arange(12) % 3
    tokens, _ = choose_over(2, logits, sampling(12, temperature=1.5, seed=seeds, position=7))
    assert (tokens == tokens[seeds]).all()
    assert len(set(tokens.tolist())) > 1


def test_frequencies_are_those_of_the_distribution() -> None:
    count = 4000
    logits = np.repeat(random_logits(1, 2) / 3, count, axis=0)
    tokens, _ = choose_over(1, logits, sampling(count, seed=5, position=np.arange(count)))
    want = np.asarray(jax.nn.softmax(logits[0]))
    got = np.bincount(tokens, minlength=VOCAB) / count
    assert np.abs(got - want).max() < 4 * np.sqrt(want.max() / count)


def test_greedy_takes_the_lowest_of_equals_and_its_log_probability() -> None:
    logits = np.zeros((2, VOCAB), np.float32)
    logits[1, 40] = 2.0
    for random in (False, True):
        tokens, logprobs = choose_over(8, logits, sampling(2, temperature=0.0), random)
        assert tokens.tolist() == [0, 40]
        np.testing.assert_allclose(logprobs, np.asarray(jax.nn.log_softmax(logits))[[0, 1], [0, 40]], rtol=1e-5)


def test_a_small_temperature_or_top_k_of_one_is_greedy() -> None:
    logits = random_logits(8)
    for how in (sampling(8, temperature=1e-4, seed=1), sampling(8, top_k=1, seed=2), sampling(8, top_p=1e-6, seed=3)):
        assert (choose_over(4, logits, how)[0] == logits.argmax(axis=-1)).all()


@pytest.mark.parametrize("ways", [1, 8])
def test_padding_of_the_vocabulary_is_never_chosen(ways: int) -> None:
    logits = random_logits(64)
    logits[:, 50:] = -np.inf
    tokens, logprobs = choose_over(ways, logits, sampling(64, temperature=5.0, seed=np.arange(64)))
    assert tokens.max() < 50
    assert np.isfinite(logprobs).all()


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), ways=st.sampled_from([1, 2, 8]), count=st.sampled_from([1, 3, 20]), ties=st.booleans())
def test_the_most_likely_come_in_order_whatever_the_mesh(seed: int, ways: int, count: int, ties: bool) -> None:
    logits = random_logits(4, seed)
    logits = np.round(logits) if ties else logits
    logits[:, 60:] = -np.inf
    mesh = Mesh(np.array(jax.devices()[:ways]), ("x",), axis_types=(AxisType.Auto,))
    local = lambda part, ids: most_likely(part, ids, ("x",) if ways > 1 else (), count)  # noqa: E731
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(None, "x"), P("x")), out_specs=(P(), P()), check_vma=False)
    entries, values = jax.jit(mapped)(logits, jnp.arange(VOCAB))
    want = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(entries, want)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, want, axis=-1))


def adjusted_rows(ways: int, logits: np.ndarray, prompts: list[list[int]], fed: list[list[int]], how: ExtendedBatch) -> np.ndarray:
    """Rows adjusted on a split vocabulary, after tokens were fed one by one to slots in reverse order; every slot has biases, and ends."""
    mesh = Mesh(np.array(jax.devices()[:ways]), ("x",), axis_types=(AxisType.Auto,))
    rows = len(prompts)
    slot = jnp.arange(rows)[::-1]
    marks, bias = np.zeros((rows, VOCAB), np.uint8), np.zeros((rows, VOCAB), np.float32)
    for row, prompt in enumerate(prompts):
        marks[rows - 1 - row, prompt] = PROMPTED
        marks[rows - 1 - row, [7, 50]] |= ENDS
        bias[rows - 1 - row, [3, 50]] = 1.5, -2.0
    length = max(map(len, fed))
    tokens = np.array([each + [0] * (length - len(each)) for each in fed])
    counted = np.array([[1] * len(each) + [0] * (length - len(each)) for each in fed])

    def local(logits: jax.Array, ids: jax.Array, slots: Slots) -> jax.Array:
        for place in range(length):
            slots = count_fed(slots, slot, jnp.asarray(tokens[:, place]), jnp.asarray(counted[:, place]), ids)
        return adjust_logits(logits, slots, slot, how)

    split = P(None, "x")
    specs = (split, P("x"), Slots(split, split, split))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    slots = Slots(jnp.zeros((rows, VOCAB), jnp.int32), jnp.asarray(marks), jnp.asarray(bias))
    return np.asarray(jax.jit(mapped)(logits, jnp.arange(VOCAB), slots))


@pytest.mark.parametrize("ways", [1, 8])
def test_penalties_and_biases_equal_the_plain_twin(ways: int) -> None:
    rng = np.random.default_rng(4)
    logits = random_logits(6)
    prompts = [rng.integers(0, VOCAB, size=5).tolist() for _ in range(6)]
    fed = [rng.integers(0, 9, size=size).tolist() for size in (0, 1, 4, 7, 7, 3)]
    penalties = [(0.5, 0.0, 1.0), (0.0, 0.7, 1.0), (0.0, 0.0, 1.3), (1.0, -0.5, 0.8), (-2.0, 2.0, 2.0), (1.0, 1.0, 2.0)]
    presence, frequency, repetition = (np.array(values, np.float32) for values in zip(*penalties, strict=True))
    adjusted = np.array([1, 1, 2, 2, 1, 0], np.int32)
    none = np.zeros(6, np.int32)
    found = adjusted_rows(ways, logits, prompts, fed, ExtendedBatch(adjusted, presence, frequency, repetition, none, none, none))
    for row in range(5):
        want = adjust_logits_plain(
            logits[row], prompts[row], fed[row], {3: 1.5, 50: -2.0}, penalties[row], [7, 50] if adjusted[row] == ENDS_LATER else []
        )
        np.testing.assert_allclose(found[row], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[5], logits[5])  # not adjusted, whatever its slot holds


TEMPERATURES = [1e-45, 1e-30, 1e-6, 0.7, 100.0, 1e30, MAX_TEMPERATURE]
TOP_PS = [0.0, 1e-38, 1e-30, 0.51, 1.0]  # 0 is what is left of 1e-46
MIN_PS = [0.0, 1e-40, 0.3, 1.0]
TOP_KS = [0, 1, 5, 2**31 - 1]


def extreme_rows() -> tuple[np.ndarray, SamplingBatch]:
    """Every combination of extreme parameters, on rows of several kinds; the last entries are padding."""
    rng = np.random.default_rng(8)
    kinds = [rng.normal(size=VOCAB) * 3, rng.normal(size=VOCAB) * 1e38, rng.normal(size=VOCAB) * 1e-30, np.round(rng.normal(size=VOCAB))]
    grid = np.stack([each.ravel() for each in np.meshgrid(TEMPERATURES, TOP_PS, MIN_PS, TOP_KS, range(len(kinds)))])
    logits = np.stack(kinds)[grid[4].astype(int)].astype(np.float32)
    logits[:, 60:] = -np.inf
    rows = len(logits)
    return logits, sampling(rows, temperature=grid[0], top_p=grid[1], min_p=grid[2], top_k=grid[3].astype(np.int32), seed=np.arange(rows))


@pytest.mark.parametrize("ways", [1, 4])
def test_extremes_choose_what_the_plain_twin_keeps(ways: int) -> None:
    logits, how = extreme_rows()
    tokens, logprobs = choose_over(ways, logits, how)
    assert tokens.min() >= 0
    assert tokens.max() < 60
    exact = logits.astype(np.float64)
    scaled = (exact - exact.max(axis=-1, keepdims=True)) / np.maximum(how.temperature, 1e-38).astype(np.float64)[:, None]
    kept = keep_plain(*map(jnp.asarray, (logits, np.maximum(scaled, -1e30).astype(np.float32), how.top_k, how.top_p, how.min_p)))
    assert np.asarray(kept)[np.arange(len(tokens)), tokens].all()
    likeliest = logits[np.arange(len(tokens)), tokens] == logits.max(axis=-1)
    assert likeliest[(how.top_k == 1) | (how.top_p < 1e-20) | (how.temperature < 1e-38)].all()
    assert np.isfinite(logprobs[np.abs(logits[:, 0]) < 1e30]).all()


def test_a_huge_temperature_is_uniform_among_what_is_kept() -> None:
    count = 6000
    logits = np.repeat(random_logits(1, 2), count, axis=0)
    tokens, _ = choose_over(4, logits, sampling(count, temperature=MAX_TEMPERATURE, seed=5, position=np.arange(count)))
    assert np.abs(np.bincount(tokens, minlength=VOCAB) / count - 1 / VOCAB).max() < 5 * np.sqrt(1 / VOCAB / count)
    tokens, _ = choose_over(4, logits, sampling(count, temperature=MAX_TEMPERATURE, top_k=3, seed=5, position=np.arange(count)))
    assert set(tokens.tolist()) == set(np.argsort(-logits[0])[:3].tolist())


def test_noise_is_finite_for_all_bits() -> None:
    bits = jnp.asarray([0, 1, 2**8 - 1, 2**31, 2**32 - 2, 2**32 - 1], jnp.uint32)
    uniform = np.asarray(_uniform(bits))
    assert (uniform > 0).all()
    assert (uniform < 1).all()
