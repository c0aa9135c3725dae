"""The CPU's kernels against the plain twin: every way pages are stored, ragged lanes, random pages.

The kernels get a cache with NaN wherever no query may look; the twin, which multiplies that by zero, gets one without.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.hardware.platform import Form
from partinf.partition.quantize import Quantized, quantize
from partinf.transformer import cache
from partinf.transformer.cache import KeysValues
from partinf.transformer.kernels import choices
from partinf.transformer.kernels import cpu as cpu_kernels
from partinf.transformer.kernels import tiles as kernels
from partinf.transformer.kernels.choices import Choices
from partinf.transformer.kernels.tiles import Tiles
from tests.execution.harness import TOLERANCE

NATIVE = Tiles(64, 128, 1 << 18, native=True)
POOL = 11


def caches(kind: str, rng: np.random.Generator, kv_heads: int, page: int, size: int) -> dict[Tiles | None, KeysValues]:
    """A stacked cache of two layers for the twin, and the same with NaN (int8: as scales) in its first layer and its last two pages."""
    arrays = [rng.standard_normal((2, POOL, kv_heads, page, size)).astype(np.float32) for _ in range(2)]

    def half(array: np.ndarray, spoilt: bool) -> jax.Array | Quantized:
        hidden = np.zeros(array.shape[:2], bool)
        hidden[0], hidden[:, -2:] = spoilt, spoilt
        if kind == "int8":
            found = quantize(array, (-1,))
            scale = np.where(hidden[:, :, None, None], np.nan, found.scale)
            return Quantized(jnp.asarray(found.values), jnp.asarray(scale), found.contracted)
        wide = jnp.asarray(np.where(hidden[:, :, None, None, None], np.nan, array))
        return wide if kind == "f32" else jax.lax.bitcast_convert_type(wide.astype(jnp.bfloat16), jnp.uint16)

    return {tiles: KeysValues(*(half(array, tiles is NATIVE) for array in arrays)) for tiles in (NATIVE, None)}


def compare(run: Callable[[Tiles | None], kernels.Attended], kind: str, lanes: np.ndarray) -> None:
    for got, want in zip(run(NATIVE), run(None), strict=True):
        assert np.isfinite(np.asarray(got, np.float32)).all()
        got, want = (np.asarray(x, np.float32)[lanes] for x in (got, want))
        np.testing.assert_allclose(got, want, rtol=2**-7 if kind == "bf16" else 0, atol=TOLERANCE["bf16" if kind == "bf16" else "f32"] / 10)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler, which the kernels need")
def test_this_machine_has_the_kernels() -> None:
    assert cpu_kernels.available()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A compiler that writes a few bytes, and where it wrote them; temporary files lie in the test's own directory."""
    wrote: list[Path] = []

    def compile_to(command: tuple[str, ...], **_: object) -> None:
        made = Path(command[-1])
        if made.parent.parent.name == "full":
            raise subprocess.CalledProcessError(1, command, stderr="error: No space left on device")
        made.write_bytes(b"a library")
        if made.suffix == ".so":
            wrote.append(made)

    monkeypatch.setattr(subprocess, "run", compile_to)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return wrote


def test_a_damaged_library_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: list[Path]) -> None:
    monkeypatch.setenv("PARTINF_CACHE_DIR", str(tmp_path / "kept"))
    path = cpu_kernels._library()
    assert path.parent == tmp_path / "kept" / "native"
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], b"another" + whole[7:]):
        path.write_bytes(damaged)
        assert cpu_kernels._library().read_bytes() == whole
    assert len(compiler) == 4
    assert cpu_kernels._library() == path
    assert len(compiler) == 4


@pytest.mark.parametrize("where", ["off", "a file", "full"])
def test_what_cannot_be_kept_is_made_among_the_temporary_files(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: list[Path]
) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "full").mkdir(mode=0o700)
    monkeypatch.setenv("PARTINF_CACHE_DIR", where if where == "off" else str(tmp_path / where))
    if where == "full":
        monkeypatch.setattr(cpu_kernels, "usable", lambda _: tmp_path / "full")
    assert cpu_kernels._library().parent.parent.parent == tmp_path / "temporary"
    assert list((tmp_path / "full").iterdir()) == []


needs_kernels = pytest.mark.skipif("not cpu_kernels.available()", reason="what the test before this one found")


def attends_by(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process chooses products in this form, which says how attention multiplies bfloat16."""
    if form is Form.TILES and not cpu_kernels.has_tiles():
        pytest.skip("this machine has no such form")
    monkeypatch.setattr(choices, "_current", [Choices((("bf16", ((512, form),)),))])


KINDS = pytest.mark.parametrize(
    ("kind", "form"),
    [("f32", Form.PANELS), ("int8", Form.PANELS)]
    + [(kind, form) for kind in ("bf16", "int8 of bf16") for form in (Form.PANELS, Form.PANELS_OF_PAIRS, Form.TILES)],
)


@needs_kernels
@KINDS
@pytest.mark.parametrize(
    ("kv_heads", "group", "page", "size"), [(2, 3, 16, 64), (1, 18, 5, 32), (4, 1, 64, 128), (1, 2, 24, 80), (2, 4, 40, 96)]
)
def test_decode_equals_the_plain_twin(
    kind: str, form: Form, kv_heads: int, group: int, page: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attends_by(form, monkeypatch)
    rng, held = np.random.default_rng(5), 4
    position = np.minimum([0, page - 1, page, 2 * page + page // 2, 4 * page - 1, -1], held * page - 1)
    table = np.stack([rng.permutation(POOL - 2)[:held] for _ in position])
    for lane, last in enumerate(position):
        table[lane, last // page + 1 :] = -1
    held_by = caches(kind.partition(" ")[0], rng, kv_heads, page, size)
    q = jnp.asarray(rng.standard_normal((len(position), kv_heads * group, size)), jnp.bfloat16 if "bf16" in kind else jnp.float32)

    def run(tiles: Tiles | None) -> kernels.Attended:
        kv = held_by[tiles]

        def step(q: jax.Array, table: jax.Array, position: jax.Array) -> kernels.Attended:
            return kernels.decode(q, lambda ids: cache.read(kv, 1, ids), table, position, tiles, cache.stored(kv, 1, table))

        return jax.jit(step)(q, table, position)

    assert cpu_kernels.fits(cache.stored(held_by[NATIVE], 1, jnp.asarray(table)).pages)
    compare(run, "bf16" if "bf16" in kind else kind, position >= 0)
    assert float(run(NATIVE).mass[-1].max()) < -1e28  # saw no key


@needs_kernels
@KINDS
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(("kv_heads", "group", "page", "size"), [(2, 3, 16, 64), (1, 7, 5, 32), (3, 1, 80, 128), (1, 100, 24, 16)])
def test_prefill_equals_the_plain_twin(
    kind: str, form: Form, earlier: bool, kv_heads: int, group: int, page: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of many lengths side by side, one of them over several tiles, padding between and after, slots in no order."""
    attends_by(form, monkeypatch)
    rng = np.random.default_rng(6)
    slots, lengths = [3, 0, 5, 2], [5, 1, 150, 33]
    stored = np.array([0, 3 * page, 0, page + 1, 0, 2 * page - 3]) if earlier else np.zeros(6, int)
    owner = np.concatenate([[slot] * length + [-1] * (slot == 0) for slot, length in zip(slots, lengths, strict=True)] + [[-1] * 3])
    place = [np.r_[stored[slot] + np.arange(length), [0] * (slot == 0)] for slot, length in zip(slots, lengths, strict=True)]
    position = np.concatenate([*place, np.zeros(3)]).astype(int)
    dtype = jnp.bfloat16 if "bf16" in kind else jnp.float32
    q = jnp.asarray(rng.standard_normal((len(owner), kv_heads * group, size)), dtype)
    new = KeysValues(*(jnp.asarray(rng.standard_normal((kv_heads, len(owner), size)), dtype) for _ in range(2)))
    held_by = caches(kind.partition(" ")[0], rng, kv_heads, page, size)
    table = np.stack([rng.permutation(POOL - 2)[:3] for _ in stored])

    def run(tiles: Tiles | None) -> kernels.Attended:
        kv = held_by[tiles]

        def step(q: jax.Array, new: KeysValues, owner: jax.Array, position: jax.Array, starts: jax.Array) -> kernels.Attended:
            read, ids = lambda ids: cache.read(kv, 1, ids), jnp.asarray(table)
            context = kernels.Context(read, ids, jnp.arange(len(stored)), starts, cache.stored(kv, 1, ids)) if earlier else None
            return kernels.prefill(q, owner, position, kernels.Fresh(new, owner, position), context, tiles)

        return jax.jit(step)(q, new, owner, position, stored)

    compare(run, "bf16" if "bf16" in kind else kind, owner >= 0)


@needs_kernels
@pytest.mark.parametrize("form", [Form.PANELS, Form.PANELS_OF_PAIRS, Form.TILES])
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (40, 5.0)])
def test_prompts_in_bfloat16_are_as_exact_as_their_rounding(form: Form, window: int, cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 of the same numbers: weights of values are rounded to 8 bits at most, sums are float32."""
    attends_by(form, monkeypatch)
    rng, tokens, heads, size = np.random.default_rng(7), 333, 2, 64
    owner, position = jnp.zeros(tokens, int), jnp.arange(tokens)
    q, keys, values = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((tokens, heads, size), *[(1, tokens, size)] * 2))
    scores = np.einsum("thq,mq->htm", np.asarray(q, np.float64), np.asarray(keys[0], np.float64)) / size**0.5
    scores = cap * np.tanh(scores / cap) if cap else scores
    age = np.arange(tokens)[:, None] - np.arange(tokens)
    parts = np.where((age >= 0) & (age < (window or tokens)), np.exp(scores), 0.0)
    magnitude = np.einsum("htm,mq->thq", parts / parts.sum(-1, keepdims=True), np.abs(np.asarray(values[0], np.float64)))
    want = np.einsum("htm,mq->thq", parts / parts.sum(-1, keepdims=True), np.asarray(values[0], np.float64))
    fresh = kernels.Fresh(KeysValues(keys, values), owner, position)
    got, mass = kernels.prefill(q, owner, position, fresh, None, NATIVE, kernels.Scores(size**-0.5, cap, window))
    assert (np.abs(np.asarray(got, np.float64) - want) <= 2**-8 * np.abs(want) + 2**-9 * magnitude + 1e-6).all()
    np.testing.assert_allclose(mass, np.log(parts.sum(-1)).T, atol=2e-5)


@needs_kernels
@pytest.mark.parametrize("form", [Form.PANELS, Form.PANELS_OF_PAIRS, Form.TILES])
def test_a_key_that_is_no_number_reaches_those_alone_that_see_it(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    attends_by(form, monkeypatch)
    rng, tokens, spoilt = np.random.default_rng(8), 200, 70
    owner, position = jnp.asarray([0] * 100 + [1] * 100), jnp.asarray([*range(100), *range(100)])
    q, keys, values = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((tokens, 2, 32), *[(1, tokens, 32)] * 2))
    fresh = kernels.Fresh(KeysValues(keys.at[0, spoilt].set(jnp.nan), values), owner, position)
    got, _ = kernels.prefill(q.at[150].set(jnp.nan), owner, position, fresh, None, NATIVE)
    lost = np.isnan(np.asarray(got, np.float32)).any((1, 2))
    np.testing.assert_array_equal(lost, [(spoilt <= row < 100) or row == 150 for row in range(tokens)])


@needs_kernels
def test_what_does_not_fit_is_left_to_the_tiles() -> None:
    plain = jnp.zeros((4, 8, 32))
    assert cpu_kernels.fits(KeysValues(plain, plain))
    assert not cpu_kernels.fits(KeysValues(plain[..., :24], plain[..., :24]))


@pytest.mark.parametrize("compiler", ["off", "/nowhere/c++"])
def test_without_a_compiler_xla_does_it(compiler: str, tmp_path: Path) -> None:
    """A machine without kernels says so once, and nothing else changes."""
    program = (
        "from partinf.transformer.kernels import cpu as cpu_kernels\n"
        "import jax.numpy as jnp\n"
        "from partinf.transformer.cache import KeysValues\n"
        "x = jnp.zeros((1, 16, 16))\n"
        "print([cpu_kernels.fits(KeysValues(x, x)) for _ in range(2)])\n"
    )
    environment = os.environ | {"CXX": compiler, "PATH": str(tmp_path), "PARTINF_CACHE_DIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[-2] == "[False, False]"
    assert found.stderr.count("CPU steps run by XLA alone") == (compiler != "off")


def test_a_compiler_that_takes_too_long_is_the_reason() -> None:
    late = subprocess.TimeoutExpired(("c++", "-c"), 300, stderr=b"warning: large function\n")
    assert cpu_kernels._reason(late) == "the compiler took longer than 300 s"
