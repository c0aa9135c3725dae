"""Compiled steps on disk: a second start loads them, answers the same and updates its state in place; nothing bad is ever run."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType

from partinf.buckets import Capacity, with_capacity
from partinf.engine import Engine, SamplingParams
from partinf.engine.step import PageTable, PrefillChunk, RowSampling, Step
from partinf.execution.place import place_step
from partinf.execution.runner import JaxRunner
from partinf.foundation.errors import InvalidInput
from partinf.layout.files import make_layout
from partinf.partition.sharding import device_mesh
from partinf.plans import Plan
from partinf.transformer.batch import pack
from partinf.transformer.executables import ExecutableCache, Obtained, obtain, open_cache, program_key
from partinf.transformer.params import random_params
from partinf.transformer.step import empty_state
from tests.execution.harness import MODEL, make_plan

PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7]]
PARAMS = SamplingParams(max_tokens=5, temperature=1.0, seed=3)
LAYOUT = make_layout({"x": "embed", "y": "ffn", "z": "replica"}, {"x": "batch", "y": "heads", "z": "none"}, dict.fromkeys("xyz", "heads"))


@pytest.fixture(autouse=True)
def without_the_cache_of_jax() -> Iterator[None]:
    """jax remembers whether it has a cache, until it is reset."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def plan_of(extended: bool = False) -> Plan:
    wanted = Capacity(max_rows=4, max_len=12, prefill_tokens=8, page_size=4, extended=extended)
    plan = with_capacity(make_plan("2x2x2", LAYOUT, MODEL), wanted)
    return replace(plan, buckets=plan.buckets[-1:])


def runner_of(plan: Plan, cache: ExecutableCache | None, unrolled: bool = False) -> JaxRunner:
    mesh = device_mesh(plan)
    return JaxRunner(plan, random_params(plan, mesh, unrolled, 0), mesh, executables=cache)


def start(plan: Plan, cache: ExecutableCache | None, unrolled: bool = False) -> tuple[JaxRunner, Any]:
    runner = runner_of(plan, cache, unrolled)
    return runner, runner.warm_up()


def test_a_second_start_compiles_nothing_and_answers_the_same(tmp_path: Path, nothing_compiles) -> None:
    plan, cache = plan_of(extended=True), ExecutableCache(tmp_path / "programs")
    first, done = start(plan, cache)
    assert (done.compiled, done.loaded) == (2, 0)
    params = replace(PARAMS, presence_penalty=1.0, top_logprobs=2)
    want = [(output.tokens, output.top_logprobs) for output in Engine(first).generate(PROMPTS, params)]
    second = runner_of(plan, cache)
    with nothing_compiles():
        done = second.warm_up(buckets=())
        assert (done.compiled, done.loaded) == (0, 1)  # what every step needs
        assert done.load_seconds > 0
        engine = Engine(second, lag=1)
        assert [(output.tokens, output.top_logprobs) for output in engine.generate(PROMPTS, params)] == want
        assert second.warm_up().loaded == 0
    assert (second.num_compiled, second.num_loaded) == (0, 2)  # the step itself when it first came


def test_a_loaded_step_still_updates_its_state_in_place(tmp_path: Path) -> None:
    plan, cache, unrolled = plan_of(), ExecutableCache(tmp_path), True
    start(plan, cache, unrolled)
    runner, done = start(plan, cache, unrolled)
    assert done.loaded == 1
    (bucket,) = plan.buckets
    state = empty_state(plan, runner.mesh, unrolled)
    leaves = jax.tree.leaves(state.kv)
    before = [shard.data.unsafe_buffer_pointer() for leaf in leaves for shard in leaf.addressable_shards]
    chunk = PrefillChunk(0, 0, (1, 2, 3), 0, (PageTable((0,)),), True, RowSampling())
    placed = place_step(Step(prefill=(chunk,)), bucket, plan, runner.limits)
    new, _ = runner._steps[bucket](runner.params, state, jax.device_put(pack([placed.batch]), runner._batch_sharding))
    after = [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(new.kv) for shard in leaf.addressable_shards]
    assert after == before
    assert all(leaf.is_deleted() for leaf in leaves)
    assert np.abs(np.asarray(jax.tree.leaves(new.kv)[0], np.float32)).max() > 0


def obtain_small(cache: ExecutableCache) -> Obtained:
    """A program of one addition, which must work wherever it comes from."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    compile_one = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2,), np.float32)).compile
    program, obtained = obtain(cache, "key", mesh, compile_one)
    assert np.asarray(program(np.ones(2, np.float32))).tolist() == [2, 2]
    return obtained


def test_damaged_entries_are_replaced(tmp_path: Path) -> None:
    cache = ExecutableCache(tmp_path)
    obtain_small(cache)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    foreign = pickle.dumps("of another program")
    foreign = whole[:21] + hashlib.sha256(foreign).digest() + foreign
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b"x" * 100, foreign):
        entry.write_bytes(damaged)
        assert [obtain_small(cache).loaded for _ in range(2)] == [0, 1]
    assert list(tmp_path.iterdir()) == [entry]  # nothing half written is left


def test_a_program_that_the_cache_of_jax_has_is_compiled_anew_and_kept(tmp_path: Path) -> None:
    """What jax's cache returns on a CPU is serialised without its code: it would load, and fail when it runs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        for _ in range(2):
            jax.clear_caches()
            jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2,), np.float32)).compile()
        entries = sorted((tmp_path / "jax").iterdir())
        assert entries
        cache = ExecutableCache(tmp_path / "ours")
        assert [obtain_small(cache).loaded for _ in range(3)] == [0, 1, 1]
        assert len(list((tmp_path / "ours").iterdir())) == 1
        # jax's cache is on again afterwards, and holds nothing of ours.
        assert jax.config.jax_enable_compilation_cache
        jax.jit(lambda x: x + 2).lower(jax.ShapeDtypeStruct((2,), np.float32)).compile()
        assert len(set((tmp_path / "jax").iterdir()) - set(entries)) == 1
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def test_programs_that_are_obtained_by_many_threads_are_all_kept(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    mesh, cache = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,)), ExecutableCache(tmp_path / "ours")

    def program(number: int) -> Obtained:
        compile_one = jax.jit(lambda x: x + number).lower(jax.ShapeDtypeStruct((2,), np.float32)).compile
        return obtain(cache, f"key{number % 4}", mesh, compile_one)[1]

    with ThreadPoolExecutor(4) as pool:
        assert all(done.compiled + done.loaded == 1 for done in pool.map(program, range(12)))
    assert sorted(path.stem for path in (tmp_path / "ours").iterdir()) == ["key0", "key1", "key2", "key3"]
    for number in range(4):
        loaded = cache.load(f"key{number}", jax.devices()[:1])
        assert float(loaded(np.zeros(2, np.float32))[0]) % 4 == number
    assert jax.config.jax_enable_compilation_cache


def test_what_a_program_depends_on_is_in_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    mesh, (bucket,) = device_mesh(plan), plan.buckets
    name = program_key(plan, mesh, bucket, False)
    assert name == program_key(replace(plan, note="why", predicted=()), mesh, bucket, False)
    others = [
        program_key(plan, mesh, bucket, True),
        program_key(plan, mesh, replace(bucket, decode_pages=1), False),
        program_key(replace(plan, cache=replace(plan.cache, page_size=8)), mesh, bucket, False),
        program_key(replace(plan, model=replace(MODEL, ffn_dim=128)), mesh, bucket, False),
        program_key(replace(plan, buckets=(replace(bucket, extended=True),)), mesh, bucket, False),
        program_key(plan, device_mesh(plan, jax.devices()[::-1]), bucket, False),
    ]
    monkeypatch.setenv("XLA_FLAGS", "--xla_other")
    others.append(program_key(plan, mesh, bucket, False))
    monkeypatch.undo()
    monkeypatch.setattr("partinf.transformer.executables._source", lambda: "changed")
    others.append(program_key(plan, mesh, bucket, False))
    assert len({name, *others}) == 1 + len(others)


def test_the_oldest_make_room(tmp_path: Path) -> None:
    compiled = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2,), np.float32)).compile()
    cache = ExecutableCache(tmp_path, max_bytes=1)
    for key in "abc":
        cache.store(key, compiled)
    assert [path.stem for path in tmp_path.iterdir()] == ["c"]
    assert cache.load("a", jax.devices()) is None
    loaded = cache.load("c", jax.devices()[:1])
    assert np.asarray(loaded(np.ones(2, np.float32))).tolist() == [2, 2]


def test_where_programs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTINF_CACHE_DIR", "off")
    assert open_cache() is None
    assert open_cache("off") is None
    assert open_cache(tmp_path / "here").directory == tmp_path / "here"
    monkeypatch.setenv("PARTINF_CACHE_DIR", str(tmp_path / "there"))
    assert open_cache().directory == tmp_path / "there"
    monkeypatch.delenv("PARTINF_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_cache().directory == tmp_path / "partinf" / "executables"
    assert open_cache().directory.stat().st_mode & 0o777 == 0o700
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(InvalidInput, match="others may write to it"):
        open_cache(tmp_path / "shared")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="name another directory, or 'off'"):
        open_cache(tmp_path / "file" / "below")
    monkeypatch.setenv("PARTINF_CACHE_DIR", str(tmp_path / "file"))
    assert open_cache() is None  # not requested explicitly: a warning


def test_a_full_disk_keeps_nothing_and_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ExecutableCache(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert [obtain_small(cache).compiled for _ in range(2)] == [1, 1]
    assert list(tmp_path.iterdir()) == []
