"""orbax and Flax: the same numbers in another mesh and in a module, and clear words where trees differ."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from partinf.checkpoint import orbax_store
from partinf.checkpoint.flax_state import from_nnx_state, to_nnx_state
from partinf.checkpoint.hf import load_hf
from partinf.checkpoint.hf_names import leaf_sources
from partinf.foundation.errors import InvalidInput
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.partition.sharding import in_order
from tests.checkpoint.paths import FIXTURES
from tests.checkpoint.trees import abstract_tree, assert_same, make_mesh, random_params

GQA = FIXTURES / "llama_gqa"


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return load_model_config(GQA)


@pytest.mark.parametrize("stacked", [False, True])
def test_orbax_restores_into_another_mesh(config: ModelConfig, tmp_path: Path, stacked: bool) -> None:
    params = load_hf(GQA, config, abstract_tree(config, make_mesh(4, 2), stacked=stacked))
    orbax_store.save(params, tmp_path / "saved")
    turned = lambda leaf: leaf.update(sharding=in_order(leaf.sharding, leaf.shape, True)) if leaf.ndim > 1 else leaf  # noqa: E731
    wanted = jax.tree.map(turned, abstract_tree(config, make_mesh(1, 2), stacked=stacked))
    restored = orbax_store.restore(tmp_path / "saved", wanted)
    assert_same(restored, params)
    assert_same(load_hf(GQA, config, wanted), params)
    for found in (restored, load_hf(GQA, config, wanted)):
        for array, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert array.sharding == leaf.sharding
            assert leaf.format.layout is None or array.format.layout.major_to_minor == leaf.format.layout.major_to_minor


def test_orbax_casts_to_the_type_of_the_tree(config: ModelConfig, tmp_path: Path) -> None:
    params = random_params(config)
    orbax_store.save(params, tmp_path / "saved")
    restored = orbax_store.restore(tmp_path / "saved", abstract_tree(config, make_mesh(2, 2), dtype=jnp.bfloat16))
    assert_same(restored, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def test_orbax_lists_every_difference(config: ModelConfig, tmp_path: Path) -> None:
    params = random_params(config)
    params["layers"][1]["wq"] = jnp.zeros((8, 4, 64))
    params["bias"] = jnp.zeros(3)
    del params["final_norm"]
    orbax_store.save(params, tmp_path / "saved")
    with pytest.raises(InvalidInput) as caught:
        orbax_store.restore(tmp_path / "saved", abstract_tree(config, make_mesh(1, 1)))
    assert sorted(caught.value.offences) == [
        "bias: found in the checkpoint saved with shape (3,); the model has no such leaf",
        "final_norm: missing in the checkpoint saved; the model expects shape (64,)",
        "layers/1/wq: found shape (8, 4, 64) in the checkpoint saved; the model expects (8, 8, 64)",
    ]


def test_orbax_refuses_what_is_no_checkpoint(config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="exists; expected the name of a new checkpoint"):
        orbax_store.save({"embed": jnp.zeros(2)}, tmp_path)
    with pytest.raises(InvalidInput, match="no such directory"):
        orbax_store.restore(tmp_path / "absent", {})
    with pytest.raises(InvalidInput, match="no orbax checkpoint of a tree: found nothing"):
        orbax_store.restore(tmp_path, {})


class Layer(nnx.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape)))


class Llama(nnx.Module):
    """A module with the attribute names of the parameter tree, as users train it."""

    def __init__(self, config: ModelConfig) -> None:
        shapes = {path: source.leaf_shape for path, source in leaf_sources(config).items()}
        for name in ("embed", "final_norm", "unembed"):
            setattr(self, name, nnx.Param(jnp.zeros(shapes[name])))
        one = {path.removeprefix("layers/0/"): shape for path, shape in shapes.items() if path.startswith("layers/0/")}
        self.layers = nnx.List([Layer(one) for _ in range(config.num_layers)])


def test_a_module_takes_and_gives_the_parameters(config: ModelConfig) -> None:
    params = load_hf(GQA, config, abstract_tree(config, make_mesh(4, 2)))
    module = Llama(config)
    paths = set(dict(nnx.to_flat_state(nnx.state(module))))
    nnx.update(module, to_nnx_state(params))
    assert set(dict(nnx.to_flat_state(nnx.state(module)))) == paths, "the update adds no path"
    assert module.layers[1].wq[...].sharding == params["layers"][1]["wq"].sharding
    assert_same(from_nnx_state(nnx.state(module, nnx.Param)), params)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_state_is_the_tree(config: ModelConfig, stacked: bool) -> None:
    params = random_params(config, stacked=stacked)
    state = to_nnx_state(params)
    assert_same(from_nnx_state(state), params)
    assert jax.tree.leaves(from_nnx_state(state))[0] is jax.tree.leaves(params)[0], "nothing is copied"


def test_a_sequence_with_a_gap_is_refused() -> None:
    state = nnx.State({"layers": {0: {"w": nnx.Param(jnp.zeros(1))}, 2: {"w": nnx.Param(jnp.zeros(1))}}})
    with pytest.raises(InvalidInput, match=r"layers: found the keys \[0, 2\]; expected 0 to 1 without gaps"):
        from_nnx_state(state)
