"""Random mutation of the files that describe a model: each is read, or refused with `InvalidInput`, soon and in little memory.

Few of each by default; the slow run makes as many as it takes to find what one in ten thousand finds. The seed is fixed.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partinf.checkpoint.hf import check_hf
from partinf.checkpoint.hf_leaves import read_leaf
from partinf.checkpoint.hf_names import leaf_sources, naming_of, tensor_shapes, tolerated
from partinf.checkpoint.safetensors_files import TensorReader
from partinf.foundation.errors import InvalidInput
from partinf.model.load import load_model_config
from tests.checkpoint.paths import FIXTURES

MOST_SECONDS, MOST_BYTES, MOST_LINES, MOST_CHARACTERS = 10.0, 1 << 30, 200, 1500
EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 4096, 2**31, 2**63, 10**400, -(10**400), 0.0, 0.5, -1.5, 1e-320, 1e308, float("nan"), float("inf"),
    "", "x", "false", "4096", "silu", "default", "llama3", "full_attention", "x" * 10_000, "\ud800", "\x00", "../x",
    [], {}, [0], [[]], {"a": 1}, {"": None}, ["full_attention"] * 2, [0] * 10_000,
)  # fmt: skip
KEYS = (
    "architectures", "model_type", "auto_map", "rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "layer_types",
    "use_sliding_window", "max_window_layers", "partial_rotary_factor", "quantization_config", "tie_word_embeddings", "head_dim",
    "num_key_value_heads", "text_config", "no_rope_layers", "rotary_pct", "rotary_dim", "sliding_window_pattern", "logit_scale",
    "query_pre_attn_scalar", "rope_local_base_freq", "original_max_position_embeddings", "attention_types", "multi_query",
    "dtype", "shape", "data_offsets", "weight_map", "__metadata__", "", "mystery",
)  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def changed(value: Any, rng: random.Random) -> Any:
    """A copy with one to three places deleted, replaced by an extreme or by another place's value, or joined by a new key."""
    copy = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        found = list(places(copy))
        if not found:
            break
        container, key = rng.choice(found)
        action = rng.random()
        if action < 0.2:
            del container[key]
        elif action < 0.7:
            container[key] = deepcopy(rng.choice(EXTREMES))
        elif action < 0.8:
            container[key] = deepcopy(rng.choice(found)[0])
        elif isinstance(container, dict):
            container[rng.choice(KEYS)] = deepcopy(rng.choice(EXTREMES))
        else:
            container.append(deepcopy(rng.choice(EXTREMES)))
    return copy


def damaged(text: bytes, rng: random.Random) -> bytes:
    """Bytes cut off, flipped, doubled, or buried in brackets."""
    place = rng.randrange(len(text) + 1)
    action = rng.randrange(5)
    if action == 0:
        return text[:place]
    if action == 1:
        return text[:place] + bytes([rng.randrange(256)]) + text[place + 1 :]
    if action == 2:
        return text[:place] + text[max(0, place - 40) :]
    if action == 3:
        return text[:place] + rng.choice((b"[", b'{"a":', b"9", b"-", b"\xef\xbb\xbf")) * rng.choice((1, 100, 100_000)) + text[place:]
    return bytes(rng.randrange(256) for _ in range(rng.randrange(200)))


def mutation(value: Any, rng: random.Random) -> bytes:
    text = json.dumps(changed(value, rng) if rng.random() < 0.9 else value).encode()
    return damaged(text, rng) if rng.random() < 0.2 else text


def hold(count: int, one: Callable[[random.Random], None]) -> int:
    """Make `count` attempts, each read or refused in time and memory, and return how many were refused."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number in range(count):
        start = time.perf_counter()
        try:
            one(random.Random(number))
            lines: tuple[str, ...] = ()
        except InvalidInput as error:
            lines = error.offences
            refused += 1
        except Exception as error:
            raise AssertionError(f"attempt {number} ended in {type(error).__name__}") from error
        longest = max(lines, key=len, default="")
        assert len(longest) < MOST_CHARACTERS, f"attempt {number}: {longest[:100]}"
        assert len(lines) < MOST_LINES, f"attempt {number}: {lines[0]}"
        assert time.perf_counter() - start < MOST_SECONDS, f"attempt {number}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MOST_BYTES
    print(f"{count} attempts, {refused} refused, {grown / 2**20:.0f} MiB grown")
    return refused


few = [pytest.param(250, id="few"), pytest.param(10_500, id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", few)
def test_configurations(tmp_path: Path, count: int) -> None:
    names = sorted(file.parent.name for file in FIXTURES.glob("*/expected.npz"))
    bases = [(name, json.loads((FIXTURES / name / "config.json").read_text())) for name in names]
    published = json.loads((FIXTURES / "published_configs.json").read_text())
    bases += [("llama_gqa", data) for data in published.values()]
    directories = {name: Path(shutil.copytree(FIXTURES / name, tmp_path / name)) for name in names}

    def one(rng: random.Random) -> None:
        name, data = rng.choice(bases)
        (directories[name] / "config.json").write_bytes(mutation(data, rng))
        check_hf(directories[name], load_model_config(directories[name]))

    assert hold(count, one) > count // 2


@pytest.mark.parametrize("count", [pytest.param(150, id="few"), pytest.param(9_000, id="many", marks=pytest.mark.slow)])
def test_headers(tmp_path: Path, count: int) -> None:
    """And whatever passes the check can be read, every leaf of it."""
    directory = Path(shutil.copytree(FIXTURES / "llama_gqa", tmp_path / "llama_gqa"))
    config, file = load_model_config(directory), directory / "model.safetensors"
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])

    def one(rng: random.Random) -> None:
        text = mutation(header, rng) if rng.random() < 0.9 else json.dumps(header).encode()
        length = rng.choice((0, 7, 2**31, 2**63, len(text) + 1)) if rng.random() < 0.1 else len(text)
        file.write_bytes(length.to_bytes(8, "little") + text + whole[end : rng.choice((len(whole), len(whole), len(whole) - 1))])
        with TensorReader(directory) as reader:
            naming = naming_of(config, reader.inventory.names)
            reader.check(tensor_shapes(config, naming), tolerated(config, naming))
            for source in leaf_sources(config, naming=naming).values():
                read_leaf(reader, source, (slice(None),) * len(source.leaf_shape), np.dtype(np.float32))

    assert hold(count, one) > count // 2


@pytest.mark.parametrize("count", [pytest.param(100, id="few"), pytest.param(2_000, id="many", marks=pytest.mark.slow)])
def test_indices(tmp_path: Path, count: int) -> None:
    directory = Path(shutil.copytree(FIXTURES / "llama_tied_mqa", tmp_path / "llama_tied_mqa"))
    config, file = load_model_config(directory), directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())

    def one(rng: random.Random) -> None:
        file.write_bytes(mutation(index, rng))
        check_hf(directory, config)

    assert hold(count, one) > count // 2
