"""GPT-2, OPT and Qwen 3 directories: what their tables have that Llama's has not, every number in its place."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from partinf.checkpoint.hf import check_hf, load_from, load_hf, save_hf
from partinf.checkpoint.hf_leaves import read_leaf
from partinf.checkpoint.hf_names import leaf_sources, naming_of, tensor_shapes
from partinf.checkpoint.safetensors_files import TensorReader
from partinf.checkpoint.tree_paths import by_path
from partinf.foundation.errors import InvalidInput
from partinf.model.config import ModelConfig
from partinf.model.families import FAMILIES as DECLARED
from partinf.model.family import Family
from partinf.model.hf_config import config_from_hf
from partinf.model.kinds import NormPlaces
from partinf.model.load import load_model_config
from partinf.transformer.params import declare
from tests.checkpoint.paths import FAMILIES, FIXTURES
from tests.checkpoint.trees import abstract_tree, all_tensors, assert_same, make_mesh, random_params
from tests.core.small_files import small_file

Tensors = Mapping[str, np.ndarray]


@pytest.fixture(params=FAMILIES)
def directory(request: pytest.FixtureRequest) -> Path:
    return FIXTURES / request.param


def gpt2_layer(w: Tensors, at: str, config: ModelConfig) -> dict[str, np.ndarray]:
    heads = (config.num_heads, config.head_dim)
    query, key, value = (part.T.reshape(*heads, -1) for part in np.split(w[f"{at}.attn.c_attn.weight"], 3, axis=1))
    query_bias, key_bias, value_bias = (part.reshape(heads) for part in np.split(w[f"{at}.attn.c_attn.bias"], 3))
    return {
        "attention_norm": w[f"{at}.ln_1.weight"],
        "attention_norm_bias": w[f"{at}.ln_1.bias"],
        "wq": query,
        "bq": query_bias,
        "wkv": np.stack([key, value]),
        "bkv": np.stack([key_bias, value_bias]),
        "wo": w[f"{at}.attn.c_proj.weight"].T,
        "bo": w[f"{at}.attn.c_proj.bias"],
        "ffn_norm": w[f"{at}.ln_2.weight"],
        "ffn_norm_bias": w[f"{at}.ln_2.bias"],
        "w_in": w[f"{at}.mlp.c_fc.weight"].T[None],
        "b_in": w[f"{at}.mlp.c_fc.bias"][None],
        "w_out": w[f"{at}.mlp.c_proj.weight"].T,
        "b_out": w[f"{at}.mlp.c_proj.bias"],
    }


def opt_layer(w: Tensors, at: str, config: ModelConfig) -> dict[str, np.ndarray]:
    heads = (config.num_heads, config.head_dim)
    return {
        "attention_norm": w[f"{at}.self_attn_layer_norm.weight"],
        "attention_norm_bias": w[f"{at}.self_attn_layer_norm.bias"],
        "wq": w[f"{at}.self_attn.q_proj.weight"].reshape(*heads, -1),
        "bq": w[f"{at}.self_attn.q_proj.bias"].reshape(heads),
        "wkv": np.stack([w[f"{at}.self_attn.{letter}_proj.weight"].reshape(*heads, -1) for letter in "kv"]),
        "bkv": np.stack([w[f"{at}.self_attn.{letter}_proj.bias"].reshape(heads) for letter in "kv"]),
        "wo": w[f"{at}.self_attn.out_proj.weight"],
        "bo": w[f"{at}.self_attn.out_proj.bias"],
        "ffn_norm": w[f"{at}.final_layer_norm.weight"],
        "ffn_norm_bias": w[f"{at}.final_layer_norm.bias"],
        "w_in": w[f"{at}.fc1.weight"][None],
        "b_in": w[f"{at}.fc1.bias"][None],
        "w_out": w[f"{at}.fc2.weight"],
        "b_out": w[f"{at}.fc2.bias"],
    }


def qwen3_layer(w: Tensors, at: str, config: ModelConfig) -> dict[str, np.ndarray]:
    kv_heads = (config.num_kv_heads, config.head_dim)
    return {
        "attention_norm": w[f"{at}.input_layernorm.weight"],
        "wq": w[f"{at}.self_attn.q_proj.weight"].reshape(config.num_heads, config.head_dim, -1),
        "wkv": np.stack([w[f"{at}.self_attn.{letter}_proj.weight"].reshape(*kv_heads, -1) for letter in "kv"]),
        "q_norm": w[f"{at}.self_attn.q_norm.weight"],
        "k_norm": w[f"{at}.self_attn.k_norm.weight"],
        "wo": w[f"{at}.self_attn.o_proj.weight"],
        "ffn_norm": w[f"{at}.post_attention_layernorm.weight"],
        "w_in": np.stack([w[f"{at}.mlp.gate_proj.weight"], w[f"{at}.mlp.up_proj.weight"]]),
        "w_out": w[f"{at}.mlp.down_proj.weight"],
    }


def neox_layer(w: Tensors, at: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """Query, key and value of each head stand together."""
    heads = (config.num_heads, 3, config.head_dim)
    matrix, bias = w[f"{at}.attention.query_key_value.weight"].reshape(*heads, -1), w[f"{at}.attention.query_key_value.bias"].reshape(heads)
    return {
        "attention_norm": w[f"{at}.input_layernorm.weight"],
        "attention_norm_bias": w[f"{at}.input_layernorm.bias"],
        "wq": matrix[:, 0],
        "bq": bias[:, 0],
        "wkv": np.stack([matrix[:, 1], matrix[:, 2]]),
        "bkv": np.stack([bias[:, 1], bias[:, 2]]),
        "wo": w[f"{at}.attention.dense.weight"],
        "bo": w[f"{at}.attention.dense.bias"],
        "ffn_norm": w[f"{at}.post_attention_layernorm.weight"],
        "ffn_norm_bias": w[f"{at}.post_attention_layernorm.bias"],
        "w_in": w[f"{at}.mlp.dense_h_to_4h.weight"][None],
        "b_in": w[f"{at}.mlp.dense_h_to_4h.bias"][None],
        "w_out": w[f"{at}.mlp.dense_4h_to_h.weight"],
        "b_out": w[f"{at}.mlp.dense_4h_to_h.bias"],
    }


def phi3_layer(w: Tensors, at: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """Queries, keys and values stand one after the other, and so do gate and up."""
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    query, key, value = np.split(w[f"{at}.self_attn.qkv_proj.weight"], [heads * size, (heads + kv_heads) * size])
    return {
        "attention_norm": w[f"{at}.input_layernorm.weight"],
        "wq": query.reshape(heads, size, -1),
        "wkv": np.stack([key.reshape(kv_heads, size, -1), value.reshape(kv_heads, size, -1)]),
        "wo": w[f"{at}.self_attn.o_proj.weight"],
        "ffn_norm": w[f"{at}.post_attention_layernorm.weight"],
        "w_in": np.stack(np.split(w[f"{at}.mlp.gate_up_proj.weight"], 2)),
        "w_out": w[f"{at}.mlp.down_proj.weight"],
    }


def cohere2_layer(w: Tensors, at: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """Neighbours are pairs of the rotation: of four rows of a head the first and third come first."""
    kv_heads = (config.num_kv_heads, config.head_dim)
    order = [0, 2, 1, 3]
    key, value = (w[f"{at}.self_attn.{letter}_proj.weight"].reshape(*kv_heads, -1) for letter in "kv")
    return {
        "attention_norm": w[f"{at}.input_layernorm.weight"],
        "wq": w[f"{at}.self_attn.q_proj.weight"].reshape(config.num_heads, config.head_dim, -1)[:, order],
        "wkv": np.stack([key[:, order], value]),
        "wo": w[f"{at}.self_attn.o_proj.weight"],
        "w_in": np.stack([w[f"{at}.mlp.gate_proj.weight"], w[f"{at}.mlp.up_proj.weight"]]),
        "w_out": w[f"{at}.mlp.down_proj.weight"],
    }


# Of each family: its layers, where they are, and the model's own tensors (the rows of the positions that are used come last).
BY_HAND: dict[str, tuple[Callable[..., dict[str, np.ndarray]], str, dict[str, str]]] = {
    "gpt2_small": (
        gpt2_layer,
        "transformer.h",
        {"embed": "wte.weight", "positions": "wpe.weight", "final_norm": "ln_f.weight", "final_norm_bias": "ln_f.bias"},
    ),
    "opt_small": (
        opt_layer,
        "model.decoder.layers",
        {
            "embed": "embed_tokens.weight",
            "positions": "embed_positions.weight",
            "final_norm": "final_layer_norm.weight",
            "final_norm_bias": "final_layer_norm.bias",
        },
    ),
    "neox_small": (
        neox_layer,
        "gpt_neox.layers",
        {"embed": "embed_in.weight", "final_norm": "final_layer_norm.weight", "final_norm_bias": "final_layer_norm.bias"},
    ),
    "phi3_small": (phi3_layer, "model.layers", {"embed": "embed_tokens.weight", "final_norm": "norm.weight"}),
    "cohere2_small": (cohere2_layer, "model.layers", {"embed": "embed_tokens.weight", "final_norm": "norm.weight"}),
    "qwen3_small": (qwen3_layer, "model.layers", {"embed": "embed_tokens.weight", "final_norm": "norm.weight"}),
}


def expected_params(directory: Path, config: ModelConfig, stacked: bool) -> Any:
    """The tree built by hand from whole tensors, without the tables."""
    whole = {name: np.asarray(tensor, np.float32) for name, tensor in all_tensors(directory).items()}
    make_layer, at, names = BY_HAND[directory.name]
    tree: dict[str, Any] = {leaf: whole[f"{at.rpartition('.')[0]}.{name}"] for leaf, name in names.items()}
    if not config.tied_embeddings:
        tree["unembed"] = whole["embed_out.weight"] if "embed_out.weight" in whole else whole["lm_head.weight"]
    for table in ("embed", "unembed"):
        if table in tree:
            tree[table] = np.pad(tree[table], ((0, config.padded_vocab_size - config.vocab_size), (0, 0)))
    if "positions" in tree:
        tree["positions"] = tree["positions"][-config.max_len :]
    layers = tuple(make_layer(whole, f"{at}.{number}", config) for number in range(config.num_layers))
    tree["layers"] = jax.tree.map(lambda *parts: np.stack(parts), *layers) if stacked else layers
    return tree


@pytest.mark.parametrize("rows, columns, stacked", [(1, 1, False), (4, 2, False), (2, 4, True)])
def test_every_shard_is_the_slice_of_the_whole(directory: Path, rows: int, columns: int, stacked: bool) -> None:
    """And all shards together cost each byte once: of a fused tensor, each leaf reads its own part."""
    config = load_model_config(directory)
    expected = expected_params(directory, config, stacked)
    with TensorReader(directory) as reader:
        assert_same(load_from(reader, config, abstract_tree(config, make_mesh(rows, columns), stacked=stacked)), expected)
        skipped = 2 * 64 * 2 if directory.name == "opt_small" else 0  # two rows of positions
        assert reader.bytes_read == sum(tensor.nbytes for tensor in all_tensors(directory).values()) - skipped


@pytest.mark.parametrize("name", ["phi3_small", "cohere2_small"])
def test_rows_of_fused_and_of_interleaved_tensors(name: str) -> None:
    config = load_model_config(FIXTURES / name)
    expected = expected_params(FIXTURES / name, config, False)
    assert_same(load_hf(FIXTURES / name, config, abstract_tree(config, make_mesh(1, 1))), expected)
    test_any_slice_equals_the_slice_of_the_whole(FIXTURES / name, stacked=True)


@pytest.mark.parametrize("stacked", [False, True])
def test_any_slice_equals_the_slice_of_the_whole(directory: Path, stacked: bool) -> None:
    config = load_model_config(directory)
    whole = by_path(expected_params(directory, config, stacked))
    generator = np.random.default_rng(0)
    with TensorReader(directory) as reader:
        for path, source in leaf_sources(config, stacked, naming=naming_of(config, reader.inventory.names)).items():
            for _ in range(6):
                ends = [sorted(generator.choice(size + 1, 2, replace=False)) for size in source.leaf_shape]
                index = tuple(slice(int(start), int(stop)) for start, stop in ends)
                found = read_leaf(reader, source, index, np.dtype(np.float32))
                np.testing.assert_array_equal(found, whole[path][index], err_msg=f"{path} {index}")


def test_padded_heads_are_zeros_at_the_end(directory: Path) -> None:
    """Of keys and values too, where every query head has its own."""
    config = load_model_config(directory)
    padded, heads = config.with_padded_heads(12), {"wq": 0, "bq": 0, "wkv": 1, "bkv": 1, "wo": 1}
    abstract = abstract_tree(padded, make_mesh(1, 1))
    found = load_hf(directory, config, abstract, padded_heads=12)["layers"][1]
    for name, whole in expected_params(directory, config, False)["layers"][1].items():
        missing = found[name].shape[heads[name]] - whole.shape[heads[name]] if name in heads else 0
        widths = [(0, missing if dim == heads.get(name) else 0) for dim in range(whole.ndim)]
        np.testing.assert_array_equal(found[name], np.pad(whole, widths), err_msg=name)


def test_the_tables_have_the_leaves_of_the_parameter_tree(directory: Path) -> None:
    config = load_model_config(directory)
    for stacked in (False, True):
        declared = {path: leaf.shape for path, leaf in by_path(declare(config, not stacked)).items()}
        assert {path: source.leaf_shape for path, source in leaf_sources(config, stacked).items()} == declared


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def offences(directory: Path) -> tuple[str, ...]:
    with pytest.raises(InvalidInput) as caught:
        check_hf(directory, load_model_config(directory))
    return caught.value.offences


@pytest.mark.parametrize(
    "name, missing, misshapen, words",
    [
        ("gpt2_small", "transformer.h.1.attn.c_attn.bias", "transformer.h.0.attn.c_attn.weight", ("(192,)", "(64, 192)")),
        ("opt_small", "model.decoder.layers.1.fc1.bias", "model.decoder.embed_positions.weight", ("(128,)", "(66, 64)")),
        ("qwen3_small", "model.layers.1.self_attn.k_norm.weight", "model.layers.0.self_attn.q_proj.weight", ("(16,)", "(128, 64)")),
    ],
)
def test_offences_name_tensors_as_they_are_stored(tmp_path: Path, name: str, missing: str, misshapen: str, words: tuple[str, str]) -> None:
    directory = Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[missing]
        tensors[misshapen] = np.zeros((3, 3), np.float32)
        tensors["extra.weight"] = np.zeros(3, np.float32)

    edit(directory, change)
    assert offences(directory) == (
        f"{missing}: missing; expected shape {words[0]}",
        f"{misshapen}: found shape (3, 3), expected {words[1]}",
        "extra.weight: unexpected: found shape (3,); the architecture has no such tensor",
    )


@pytest.mark.parametrize("name, base, instead", [("gpt2_small", "transformer.", ""), ("opt_small", "model.decoder.", "decoder.")])
def test_names_as_they_were_first_published(tmp_path: Path, name: str, base: str, instead: str) -> None:
    """Without the prefix, with the masks that GPT-2 kept as buffers, and with the tied matrix stored again."""
    directory = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
    tensors = {key.replace(base, instead, 1): tensor for key, tensor in load_file(directory / "model.safetensors").items()}
    tensors["lm_head.weight"] = next(tensor for key, tensor in tensors.items() if key.endswith(("wte.weight", "embed_tokens.weight")))
    if name == "gpt2_small":
        tensors |= {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32), "h.0.attn.masked_bias": np.zeros((), np.float32)}
    save_file(tensors, directory / "model.safetensors")
    config = load_model_config(directory)
    abstract = abstract_tree(config, make_mesh(2, 2))
    assert_same(load_hf(directory, config, abstract), load_hf(FIXTURES / name, config, abstract))


def test_an_index_whose_files_are_missing_still_tells_the_family(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / "opt_small", tmp_path / "opt_small"))
    weight_map = dict.fromkeys(load_file(directory / "model.safetensors"), "model-00001-of-00001.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (found,) = offences(directory)
    assert "which does not exist" in found


def test_blocks_of_no_family_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no Hugging Face family has such blocks"):
        save_hf({}, load_model_config("palm-8b"), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("family", DECLARED.values(), ids=DECLARED.keys())
def test_every_family_is_saved_and_loaded_unchanged(tmp_path: Path, family: Family) -> None:
    """Fused tensors, interleaved rows and transposed matrices among them; and with every beginning that the names of its tensors may have,
    such as none, as models of embeddings are saved, or that of a model that reads images too."""
    config = config_from_hf(small_file(family), "saved")
    stacked = family.model_type < "h"
    params = random_params(config, stacked=stacked)
    save_hf(params, config, tmp_path / "saved")
    assert load_model_config(tmp_path / "saved") == config
    abstract = abstract_tree(config, make_mesh(1, 1), stacked=stacked)
    assert_same(load_hf(tmp_path / "saved", config, abstract), params)
    naming, file = family.naming_of(config), tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    assert naming.bases[1:]
    for base in naming.bases[1:]:
        others = tensor_shapes(config, dataclasses.replace(naming, bases=(base,)))
        save_file(dict(zip(others, (tensors[name] for name in tensor_shapes(config, naming)), strict=True)), file)
        assert {*load_file(file)} != {*tensors}
        assert_same(load_hf(tmp_path / "saved", config, abstract), params)


def test_tables_that_are_products_of_what_is_stored(tmp_path: Path) -> None:
    """A narrow table with a matrix on either side of the model is two tables of its width, on every mesh; saved, they are what they are."""
    directory = FIXTURES / "opt_narrow_small"
    config, tensors = load_model_config(directory), {name: np.asarray(one, np.float32) for name, one in all_tensors(directory).items()}
    table = tensors["model.decoder.embed_tokens.weight"]
    whole = load_hf(directory, config, abstract_tree(config, make_mesh(1, 1)))
    rows = config.vocab_size
    np.testing.assert_allclose(whole["embed"][:rows], table @ tensors["model.decoder.project_in.weight"].T, atol=1e-6)
    np.testing.assert_allclose(whole["unembed"][:rows], table @ tensors["model.decoder.project_out.weight"], atol=1e-6)
    assert not np.asarray(whole["embed"])[rows:].any()
    split = load_hf(directory, config, abstract_tree(config, make_mesh(2, 4)))
    np.testing.assert_allclose(np.asarray(split["unembed"]), np.asarray(whole["unembed"]), atol=1e-6)
    save_hf(whole, config, tmp_path / "saved")
    saved = load_model_config(tmp_path / "saved")
    assert (saved.table_dim, saved.tied_embeddings, saved.norms) == (0, False, NormPlaces.SUM)
    assert_same(load_hf(tmp_path / "saved", saved, abstract_tree(saved, make_mesh(1, 1))), whole)


@pytest.mark.parametrize("model_type, key", [("cohere", "use_qk_norm"), ("stablelm", "qk_layernorm")])
def test_norms_of_every_head_are_saved_and_loaded_unchanged(tmp_path: Path, model_type: str, key: str) -> None:
    """As one tensor, of which neighbours are pairs of the rotation, and as a tensor for each head; padded heads have none."""
    config = config_from_hf(small_file(DECLARED[model_type]) | {key: True}, "saved")
    params = random_params(config)
    save_hf(params, config, tmp_path / "saved")
    assert_same(load_hf(tmp_path / "saved", config, abstract_tree(config, make_mesh(1, 1))), params)
    padded = config.with_padded_heads(12)
    found = load_hf(tmp_path / "saved", config, abstract_tree(padded, make_mesh(1, 1)), padded_heads=12)["layers"][0]["q_norm"]
    np.testing.assert_array_equal(found, np.pad(params["layers"][0]["q_norm"], ((0, 4), (0, 0))))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_directory_has_the_tensors_that_transformers_wrote(tmp_path: Path, name: str) -> None:
    config = load_model_config(FIXTURES / name)
    save_hf(load_hf(FIXTURES / name, config, abstract_tree(config, make_mesh(1, 1))), config, tmp_path / "saved")
    found = all_tensors(tmp_path / "saved")
    expected = {name: np.asarray(tensor, np.float32) for name, tensor in all_tensors(FIXTURES / name).items()}
    if name == "opt_small":
        expected["model.decoder.embed_positions.weight"][:2] = 0  # which no token is given
    assert found.keys() == expected.keys()
    for tensor in found:
        np.testing.assert_array_equal(found[tensor], expected[tensor], err_msg=tensor)


def test_a_model_is_saved_as_the_family_that_its_source_named(tmp_path: Path) -> None:
    """Mistral's blocks and tensors are Llama's; its window is not."""
    llama = load_model_config(FIXTURES / "llama_gqa")
    mistral = dataclasses.replace(llama, name="mistral", family="mistral", window=16)
    params = random_params(mistral)
    save_hf(params, mistral, tmp_path / "mistral")
    assert load_model_config(tmp_path / "mistral") == mistral
    assert json.loads((tmp_path / "mistral" / "config.json").read_text())["architectures"] == ["MistralForCausalLM"]
    assert_same(load_hf(tmp_path / "mistral", mistral, abstract_tree(mistral, make_mesh(1, 1))), params)


def test_a_family_names_every_weight_that_is_wanted() -> None:
    biased = dataclasses.replace(load_model_config(FIXTURES / "opt_small"), output_bias=True)
    with pytest.raises(InvalidInput, match="OPT directories have no tensor for the weight unembed_bias"):
        leaf_sources(biased)


def test_blocks_that_no_family_has() -> None:
    with pytest.raises(
        InvalidInput,
        match=f"no Hugging Face family has such blocks; known families: {', '.join(family.title for family in DECLARED.values())}",
    ):
        leaf_sources(load_model_config("palm-8b"))
