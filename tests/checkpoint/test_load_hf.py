"""Loading and saving Hugging Face directories: every number in its place, no byte read that is not needed."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from partinf.checkpoint.hf import check_hf, load_from, load_hf, save_hf
from partinf.checkpoint.hf_leaves import read_leaf
from partinf.checkpoint.hf_names import leaf_sources, tensor_shapes
from partinf.checkpoint.safetensors_files import TensorReader
from partinf.checkpoint.tree_paths import by_path
from partinf.foundation.errors import InvalidInput
from partinf.model.config import ModelConfig
from partinf.model.hf_config import config_from_hf
from partinf.model.load import load_model_config
from tests.checkpoint.paths import FIXTURES
from tests.checkpoint.trees import SPECS, abstract_tree, all_tensors, assert_same, make_mesh, nested, random_params


def expected_params(directory: Path, config: ModelConfig, stacked: bool) -> object:
    """The tree built by hand from whole tensors, without the table."""
    whole = {name: np.asarray(tensor, np.float32) for name, tensor in all_tensors(directory).items()}
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim

    def layer(number: int) -> dict[str, np.ndarray]:
        prefix = f"model.layers.{number}"
        key, value = (whole[f"{prefix}.self_attn.{letter}_proj.weight"].reshape(kv_heads, size, -1) for letter in "kv")
        return {
            "attention_norm": whole[f"{prefix}.input_layernorm.weight"],
            "wq": whole[f"{prefix}.self_attn.q_proj.weight"].reshape(heads, size, -1),
            "wkv": np.stack([key, value]),
            "wo": whole[f"{prefix}.self_attn.o_proj.weight"],
            "ffn_norm": whole[f"{prefix}.post_attention_layernorm.weight"],
            "w_in": np.stack([whole[f"{prefix}.mlp.gate_proj.weight"], whole[f"{prefix}.mlp.up_proj.weight"]]),
            "w_out": whole[f"{prefix}.mlp.down_proj.weight"],
        }

    def padded(tensor: np.ndarray) -> np.ndarray:
        return np.pad(tensor, ((0, config.padded_vocab_size - config.vocab_size), (0, 0)))

    layers = tuple(layer(number) for number in range(config.num_layers))
    tree = {"embed": padded(whole["model.embed_tokens.weight"]), "final_norm": whole["model.norm.weight"]}
    tree["layers"] = jax.tree.map(lambda *parts: np.stack(parts), *layers) if stacked else layers
    return tree if config.tied_embeddings else tree | {"unembed": padded(whole["lm_head.weight"])}


@pytest.mark.parametrize("stacked", [False, True])
def test_every_leaf_is_in_its_place(llama: Path, config: ModelConfig, stacked: bool) -> None:
    params = load_hf(llama, config, abstract_tree(config, make_mesh(1, 1), stacked=stacked))
    assert_same(params, expected_params(llama, config, stacked))


@pytest.mark.parametrize("rows, columns, stacked", [(4, 2, False), (2, 4, True)])
def test_every_shard_is_the_slice_of_the_whole(llama: Path, config: ModelConfig, rows: int, columns: int, stacked: bool) -> None:
    abstract = abstract_tree(config, make_mesh(rows, columns), stacked=stacked)
    params = load_hf(llama, config, abstract)
    assert_same(params, expected_params(llama, config, stacked))
    for array, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert array.sharding == wanted.sharding


@pytest.mark.parametrize("stacked", [False, True])
def test_any_slice_equals_the_slice_of_the_whole(llama: Path, config: ModelConfig, stacked: bool) -> None:
    """Slices that no sharding makes either: parts of heads, one layer of a stack, rows across the end of the vocabulary."""
    whole = by_path(expected_params(llama, config, stacked))
    generator = np.random.default_rng(0)
    with TensorReader(llama) as reader:
        for path, source in leaf_sources(config, stacked).items():
            for _ in range(8):
                ends = [sorted(generator.choice(size + 1, 2, replace=False)) for size in source.leaf_shape]
                index = tuple(slice(int(start), int(stop)) for start, stop in ends)
                found = read_leaf(reader, source, index, np.dtype(np.float32))
                np.testing.assert_array_equal(found, whole[path][index], err_msg=f"{path} {index}")


def test_only_the_local_shards_are_read(llama: Path, config: ModelConfig) -> None:
    """All shards together are the tensors, each byte once; one shard alone is the bytes under it."""
    total = sum(tensor.nbytes for tensor in all_tensors(llama).values())
    with TensorReader(llama) as reader:
        load_from(reader, config, abstract_tree(config, make_mesh(4, 2)))
        assert reader.bytes_read == total

    sources = leaf_sources(config)
    with TensorReader(llama) as reader:
        read_leaf(reader, sources["layers/0/w_in"], (slice(1, 2), slice(0, 16), slice(0, 64)), np.dtype(np.float32))
        assert reader.bytes_read == 16 * 64 * 2
        # One head's part of W_O is a column block; the rows beyond the vocabulary cost nothing.
        read_leaf(reader, sources["layers/0/wo"], (slice(0, 64), slice(3 * config.head_dim, 4 * config.head_dim)), np.dtype(np.float32))
        assert reader.bytes_read == (16 * 64 + 64 * config.head_dim) * 2
        before = reader.bytes_read
        padding = read_leaf(reader, sources["embed"], (slice(config.vocab_size, None), slice(None)), np.dtype(np.float32))
        assert padding.shape == (config.padded_vocab_size - config.vocab_size, 64)
        assert not padding.any()
        assert reader.bytes_read == before


def test_replicas_share_one_read(llama: Path, config: ModelConfig) -> None:
    """Each of 8 devices holds half of w_out: 4 copies of each half, read once."""
    specs = dict.fromkeys(SPECS, (None,)) | {"w_out": ("y",)}
    with TensorReader(llama) as reader:
        load_from(reader, config, abstract_tree(config, make_mesh(4, 2), specs=specs))
        assert reader.bytes_read == sum(tensor.nbytes for tensor in all_tensors(llama).values())


def test_weights_are_cast_to_the_type_of_the_tree(llama: Path, config: ModelConfig) -> None:
    params = load_hf(llama, config, abstract_tree(config, make_mesh(2, 2), dtype=jnp.bfloat16))
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), expected_params(llama, config, False))
    assert_same(params, expected)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("max_file_bytes", [10**9, 50_000])
def test_save_and_load_is_the_identity(llama: Path, config: ModelConfig, tmp_path: Path, stacked: bool, max_file_bytes: int) -> None:
    params = random_params(config, stacked=stacked)
    save_hf(params, config, tmp_path / "saved", max_file_bytes=max_file_bytes, config_fields={"eos_token_id": [2, 5]})
    files = sorted(file.name for file in (tmp_path / "saved").glob("*.safetensors"))
    if max_file_bytes == 10**9:
        assert files == ["model.safetensors"]
    else:
        assert len(files) > 2
        assert all(file.stat().st_size < 90_000 for file in (tmp_path / "saved").glob("*.safetensors"))
    again = load_model_config(tmp_path / "saved")
    assert again.rotation == config.rotation
    assert tensor_shapes(again) == tensor_shapes(config)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["eos_token_id"] == [2, 5]
    assert_same(load_hf(tmp_path / "saved", again, abstract_tree(config, make_mesh(1, 1), stacked=stacked)), params)


def test_the_saved_config_has_the_names_of_both_transformers(llama: Path, config: ModelConfig, tmp_path: Path) -> None:
    """Version 4 reads rope_theta, rope_scaling and torch_dtype, version 5 rope_parameters and dtype; each alone gives the model back."""
    save_hf(random_params(config), config, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["dtype"] == fields["torch_dtype"] == "float32"
    only_v4 = {name: value for name, value in fields.items() if name not in ("rope_parameters", "dtype")}
    only_v5 = {name: value for name, value in fields.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert config_from_hf(only_v4, config.name) == config_from_hf(only_v5, config.name) == config


def test_saving_what_was_loaded_gives_the_same_tensors(llama: Path, config: ModelConfig, tmp_path: Path) -> None:
    """From a sharded bfloat16 tree, too. float16 becomes bfloat16, so it is compared after rounding."""
    save_hf(load_hf(llama, config, abstract_tree(config, make_mesh(4, 2), dtype=jnp.bfloat16)), config, tmp_path / "saved")
    saved, original = all_tensors(tmp_path / "saved"), all_tensors(llama)
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(saved[name], tensor.astype(jnp.bfloat16), err_msg=name)


def test_the_table_names_each_tensor_once(config: ModelConfig) -> None:
    names = [name for source in leaf_sources(config).values() for name in source.names]
    assert len(names) == len(set(names)) == 2 + (not config.tied_embeddings) + 9 * config.num_layers
    assert sorted(names) == sorted(name for source in leaf_sources(config, stacked=True).values() for name in source.names)


def test_a_tree_of_another_model_is_refused(llama: Path, config: ModelConfig) -> None:
    sizes = abstract_tree(config, make_mesh(1, 1))
    del sizes["final_norm"]
    one = sizes["layers"][0]
    sizes["layers"] = ({**one, "wq": jax.ShapeDtypeStruct((8, 4, 64), jnp.float32), "bias": one["wq"]}, *sizes["layers"][1:])
    with pytest.raises(InvalidInput) as caught:
        load_hf(llama, config, sizes)
    assert len(caught.value.offences) == 3
    text = str(caught.value)
    assert f"final_norm: missing in the parameter tree; the model {config.name} expects shape (64,)" in text
    assert f"layers/0/wq: found shape (8, 4, 64) in the parameter tree; the model {config.name} expects (8, {config.head_dim}, 64)" in text
    assert "layers/0/bias: found in the parameter tree" in text


def test_saving_into_a_directory_with_weights_is_refused(tmp_path: Path) -> None:
    config = load_model_config(FIXTURES / "llama_gqa")
    params = random_params(config)
    save_hf(params, config, tmp_path)
    del params["embed"]
    with pytest.raises(InvalidInput) as caught:
        save_hf(params, config, tmp_path)
    assert len(caught.value.offences) == 2
    assert "already holds model.safetensors" in str(caught.value)


def test_leaves_without_sharding_load_on_the_default_device() -> None:
    config = load_model_config(FIXTURES / "llama_gqa")
    bare = nested({path: jax.ShapeDtypeStruct(source.leaf_shape, jnp.float32) for path, source in leaf_sources(config).items()})
    assert_same(load_hf(FIXTURES / "llama_gqa", config, bare), expected_params(FIXTURES / "llama_gqa", config, False))


def test_checking_reads_no_weights(llama: Path, config: ModelConfig) -> None:
    check_hf(llama, config)


def test_each_device_costs_the_bytes_of_its_shard(llama: Path, config: ModelConfig) -> None:
    """What a host of a larger mesh reads is what its own devices ask for, here one device after the other."""
    mesh = make_mesh(4, 2)
    leaf = jax.ShapeDtypeStruct((2, config.ffn_dim, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "x", "y")))
    source = leaf_sources(config)["layers/1/w_in"]
    with TensorReader(llama) as reader:
        for number, index in enumerate(leaf.sharding.devices_indices_map(leaf.shape).values(), 1):
            read_leaf(reader, source, index, np.dtype(np.float32))
            assert reader.bytes_read == number * 2 * config.ffn_dim * 64 // 8 * 2
