"""Bad directories: every offence in one exception, each naming the tensor, what was found and what was expected."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from partinf.checkpoint.described import read_model
from partinf.checkpoint.hf import check_hf, load_hf
from partinf.foundation.errors import InvalidInput
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from tests.checkpoint.paths import FIXTURES
from tests.checkpoint.trees import abstract_tree, all_tensors, assert_same, make_mesh

INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A copy of the fixture with one file."""
    return Path(shutil.copytree(FIXTURES / "llama_gqa", tmp_path / "single"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A copy of the fixture with shards and an index."""
    return Path(shutil.copytree(FIXTURES / "llama_tied_mqa", tmp_path / "sharded"))


def offences(directory: Path, config: ModelConfig | None = None) -> tuple[str, ...]:
    with pytest.raises(InvalidInput) as caught:
        check_hf(directory, config or load_model_config(directory))
    return caught.value.offences


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_missing_misshapen_unexpected_and_unreadable_tensors_are_listed_together(single: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((32, 64), np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((128, 64), np.int8)

    edit(single, change)
    assert offences(single) == (
        "model.norm.weight: missing; expected shape (64,)",
        "model.layers.1.self_attn.k_proj.weight: found shape (32, 64), expected (16, 64)",
        "model.layers.0.mlp.up_proj.weight: stored as I8; expected one of BF16, F16, F32, F64",
        "model.layers.0.self_attn.q_proj.bias: unexpected: found shape (64,); the architecture has no such tensor",
    )


def test_layers_that_offend_alike_share_a_line(single: Path) -> None:
    found = offences(single, dataclasses.replace(load_model_config(single), num_layers=80))
    assert len(found) == 9
    assert "model.layers.[2-79].self_attn.q_proj.weight: missing; expected shape (64, 64) (78 tensors)" in found


def test_a_truncated_file_names_what_is_cut_off(single: Path) -> None:
    file = single / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    (found,) = offences(single)
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    del header["__metadata__"]
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    assert f"truncated: found {len(whole) - 100} bytes, expected {len(whole)}; 1 of 21 tensors cut off: {last}" in found


def test_truncation_is_found_before_any_device_is_used(single: Path) -> None:
    config = load_model_config(single)
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match="truncated"):
        load_hf(single, config, abstract_tree(config, make_mesh(4, 2)))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "truncated, or no safetensors file: 0 bytes"),
        (b"PK\x03\x04" + bytes(100), "truncated, or no safetensors file: 104 bytes"),
        ((20).to_bytes(8, "little") + b"not a header at all!", "the header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "the header is a list"),
    ],
)
def test_a_file_that_is_something_else_is_one_offence(single: Path, content: bytes, words: str) -> None:
    """The tensors that it might have held are not reported as missing as well."""
    (single / "model.safetensors").write_bytes(content)
    (found,) = offences(single)
    assert words in found


def test_a_header_that_contradicts_itself(single: Path) -> None:
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 64]}}).encode()
    (single / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    assert "contradicts itself about model.norm.weight" in offences(single)[0]


def test_tensors_that_overlap(single: Path) -> None:
    entry = {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}
    header = json.dumps({"model.norm.weight": entry, "lm_head.weight": entry}).encode()
    (single / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(256))
    assert "no valid safetensors file" in offences(single)[0]


def test_damage_is_never_a_surprise(single: Path) -> None:
    """Any bytes in the header either pass or are an offence; what passes can be loaded."""
    config = load_model_config(single)
    abstract = abstract_tree(config, make_mesh(1, 1))
    file = single / "model.safetensors"
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        place = int(generator.integers(end))
        changed = bytes([generator.choice(list(b'0123456789"[]{},:aF'))])
        file.write_bytes(whole[:place] + changed + whole[place + 1 :])
        try:
            load_hf(single, config, abstract)
        except InvalidInput:
            refused += 1
    assert refused > 30


def test_bytes_after_the_end(single: Path) -> None:
    with (single / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "the file is damaged" in offences(single)[0]


def test_an_index_that_names_a_missing_file(sharded: Path) -> None:
    (sharded / "model-00002-of-00004.safetensors").unlink()
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    count = list(weight_map.values()).count("model-00002-of-00004.safetensors")
    (found,) = offences(sharded)
    assert f"places {count} tensors in model-00002-of-00004.safetensors, which does not exist; present: model-00001-of-00004" in found


def test_an_index_that_is_wrong_about_a_tensor(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.layers.0.mlp.extra.weight"] = "model-00001-of-00004.safetensors"
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00004.safetensors"
    real = json.loads((FIXTURES / "llama_tied_mqa" / INDEX).read_text())["weight_map"]["model.norm.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    extra, moved = offences(sharded)
    assert "places model.layers.0.mlp.extra.weight in model-00001-of-00004.safetensors, which does not hold it; did you mean" in extra
    assert f"places model.norm.weight in model-00001-of-00004.safetensors; found in {real}" in moved


def test_an_index_cannot_name_a_file_elsewhere(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../single/model.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    assert "names the file '../single/model.safetensors'; expected the plain name" in offences(sharded)[0]


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', '{"weight_map": []}'])
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    (found,) = offences(sharded)
    assert "weight_map" in found


def test_shards_without_an_index(sharded: Path) -> None:
    config = load_model_config(sharded)
    (sharded / INDEX).unlink()
    abstract = abstract_tree(config, make_mesh(1, 1))
    assert_same(load_hf(sharded, config, abstract), load_hf(FIXTURES / "llama_tied_mqa", config, abstract))
    shutil.copy(sharded / "model-00001-of-00004.safetensors", sharded / "model-copy.safetensors")
    (found,) = offences(sharded)
    count = len(load_file(sharded / "model-copy.safetensors"))
    assert f"is also in model-00001-of-00004.safetensors, as are {count - 1} more of its tensors; expected each tensor in one file" in found


def test_missing_shards_are_named_and_not_their_tensors(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / "model-00001-of-00004.safetensors").unlink()
    (sharded / "model-00003-of-00004.safetensors").unlink()
    missing = "model-00001-of-00004.safetensors, model-00003-of-00004.safetensors"
    assert offences(sharded) == (f"{sharded}: 2 of 4 shards are missing: {missing}; download them",)


@pytest.mark.parametrize("indexed", [True, False])
def test_one_file_next_to_shards_is_refused(sharded: Path, indexed: bool) -> None:
    """A file of zeros would win over the shards, or be left out; it is unclear which is meant."""
    zeros = {name: np.zeros_like(tensor) for name, tensor in all_tensors(sharded).items()}
    save_file(zeros, sharded / "model.safetensors")
    if not indexed:
        (sharded / INDEX).unlink()
    (found,) = offences(sharded)
    assert "model.safetensors and shards of a model (model-00001-of-00004.safetensors first); only one of them can be meant" in found


def test_an_index_of_one_file_and_one_that_was_left_behind(single: Path) -> None:
    """An index may name the one file; one without a single shard is no reason to refuse."""
    config = load_model_config(single)
    for file in ("model.safetensors", "model-00001-of-00002.safetensors"):
        (single / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(single / "model.safetensors"), file)}))
        check_hf(single, config)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_not_left_out_silently(sharded: Path, name: str) -> None:
    (sharded / INDEX).unlink()
    (sharded / name).write_bytes(b"{}")
    assert offences(sharded) == (f"{sharded}: holds an adapter ({name}), which is not applied; merge it into the weights, or remove it",)


def test_links_pointers_and_pages_are_named(single: Path) -> None:
    file = single / "model.safetensors"
    for content, words in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 650\n", "a pointer of Git LFS, not the file"),
        (b"<!doctype html><html>Repository not found</html>", "an HTML or XML page"),
        (b"GGUF" + bytes(60), "a GGUF file"),
    ):
        file.write_bytes(content)
        (found,) = offences(single)
        assert words in found
    file.unlink()
    file.symlink_to("../../blobs/0123")
    (found,) = offences(single)
    assert "a link to ../../blobs/0123, which does not exist; download the file again" in found


def test_headers_that_are_made_to_harm(single: Path) -> None:
    """Nested, of thousands of digits, with thousands of dimensions or bad entries: one short line each, or few."""
    for header in (
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4000 + b'], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [' + b"1, " * 50_000 + b'1], "data_offsets": [0, 4]}}',
        json.dumps({f"model.layers.{number}": {"dtype": "F32"} for number in range(10_000)}).encode(),
    ):
        (single / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        found = [line for line in offences(single) if "missing; expected shape" not in line]
        assert 1 <= len(found) <= 22
        assert all(len(line) < 400 for line in found)


def test_a_tied_matrix_that_is_another_is_used(single: Path) -> None:
    """As transformers does, whatever the configuration says; and one that is stored under the name of the output matrix alone."""
    expected = load_model_config(single)
    data = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(data | {"tie_word_embeddings": True}))
    assert load_model_config(single).tied_embeddings
    config = read_model(single)
    assert dataclasses.replace(config, source=expected.source) == expected
    assert config.source.endswith("the weights have a separate output matrix, which is used")
    abstract = abstract_tree(config, make_mesh(1, 1))
    own = load_hf(single, config, abstract)
    assert not np.array_equal(own["embed"], own["unembed"])
    edit(single, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    tied = read_model(single)
    assert tied.tied_embeddings
    np.testing.assert_array_equal(load_hf(single, tied, abstract_tree(tied, make_mesh(1, 1)))["embed"], own["unembed"])
    (single / "model.safetensors").unlink()
    assert read_model(single) == load_model_config(single)  # of which the weights are missing, as the load reports


def test_a_tied_matrix_that_is_another_is_not_dropped(single: Path) -> None:
    """The copy that some tools store is read past; a different one would be dropped without a word."""
    config = dataclasses.replace(load_model_config(single), tied_embeddings=True)
    abstract = abstract_tree(config, make_mesh(1, 1))
    with pytest.raises(InvalidInput, match=r"lm_head.weight differs from model.embed_tokens.weight.* as `as_stored` describes it"):
        load_hf(single, config, abstract)
    edit(single, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    load_hf(single, config, abstract)
    edit(single, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].astype(np.float64)}))
    load_hf(single, config, abstract)
    edit(single, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"][:, :-1].copy()}))
    with pytest.raises(InvalidInput, match="lm_head.weight differs"):
        load_hf(single, config, abstract)


def test_harmless_extras_are_tolerated(single: Path) -> None:
    """Rotary buffers of old checkpoints; the output matrix that some tools store although it is tied."""
    edit(single, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}))
    config = load_model_config(single)
    check_hf(single, config)
    check_hf(single, dataclasses.replace(config, tied_embeddings=True))


def test_every_stored_type_is_read(single: Path) -> None:
    config = load_model_config(single)
    types = (np.float64, np.float32, np.float16, jnp.bfloat16)

    def change(tensors: dict[str, np.ndarray]) -> None:
        for place, name in enumerate(sorted(tensors)):
            tensors[name] = (np.round(tensors[name].astype(np.float32) * 16) / 16).astype(types[place % 4])

    edit(single, change)
    params = load_hf(single, config, abstract_tree(config, make_mesh(1, 1)))
    np.testing.assert_array_equal(params["final_norm"], all_tensors(single)["model.norm.weight"].astype(np.float32))


def test_directories_without_weights(tmp_path: Path) -> None:
    config = load_model_config(FIXTURES / "llama_gqa")
    assert "no such directory" in offences(tmp_path / "absent", config)[0]
    assert "found none; expected model.safetensors" in offences(tmp_path, config)[0]
    (tmp_path / "pytorch_model.bin").touch()
    assert "found pytorch_model.bin, which are not read" in offences(tmp_path, config)[0]
