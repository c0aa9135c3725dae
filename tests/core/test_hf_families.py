"""What configurations of the newer families mean: defaults, kinds of layers, blocks that several keys decide together."""

from __future__ import annotations

from typing import Any

import pytest

from partinf.foundation.errors import InvalidInput
from partinf.model.config import Block
from partinf.model.hf_config import config_from_hf
from partinf.model.rotation import Dynamic, Linear, Rotation

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_hidden_layers": 4, "vocab_size": 96}
FALCON = {"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 96}


def kinds(data: dict[str, Any]) -> list[tuple[int, float]]:
    """Window and theta of every layer; theta is 0 where it does not rotate."""
    model = config_from_hf(data, "mine")
    found = [model.layer_kinds[number].attention for number in model.kind_of_layers]
    return [(one.window, one.rotation.theta if one.rotation else 0.0) for one in found]


@pytest.mark.parametrize(
    "data, expected",
    [
        ({"model_type": "gemma2"}, [(4096, 1e4), (0, 1e4)] * 2),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 2, "sliding_window": 16}, [(16, 1e4), (0, 1e6)] * 2),
        ({"model_type": "cohere2", "num_key_value_heads": 4}, [(4096, 1e4)] * 3 + [(0, 0.0)]),
        ({"model_type": "exaone4", "num_key_value_heads": 4}, [(4096, 1e4)] * 3 + [(0, 0.0)]),
        ({"model_type": "smollm3"}, [(0, 2e6)] * 3 + [(0, 0.0)]),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 1]}, [(0, 2e6), (0, 0.0), (0, 2e6), (0, 2e6)]),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3, "num_key_value_heads": 4},
            [(0, 1e4)] * 3 + [(4096, 1e4)],
        ),
    ],
)
def test_layers_where_the_file_does_not_list_them(data: dict[str, Any], expected: list[tuple[int, float]]) -> None:
    assert kinds(SIZES | data) == expected


@pytest.mark.parametrize(
    "change, block, kv_heads",
    [
        ({}, Block.PARALLEL, 1),
        ({"multi_query": False, "parallel_attn": False}, Block.SERIAL, 8),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, Block.PARALLEL_TWO_NORMS, 2),
        ({"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}, Block.PARALLEL, 2),
    ],
)
def test_flags_of_falcon_decide_together(change: dict[str, Any], block: Block, kv_heads: int) -> None:
    found = config_from_hf(FALCON | change, "mine")
    assert (found.block, found.num_kv_heads) == (block, kv_heads)


def test_a_model_of_text_within_one_that_reads_images() -> None:
    """Sizes that the part leaves out are the family's; the report says that images are not read."""
    part = {"hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    data = {"model_type": "gemma3", "text_config": part, "vision_config": {"hidden_size": 1152}}
    found = config_from_hf(data, "mine")
    assert (found.family, found.num_heads, found.num_kv_heads, found.head_dim, found.vocab_size) == ("gemma3_text", 8, 4, 256, 262208)
    assert found.source == "config.json; images are not read"
    assert {kind.rotation for kind in found.kinds} == {Rotation(1e4), Rotation(1e6, scaling=Linear(8.0))}
    with pytest.raises(InvalidInput, match="text_config = 3; an object is needed"):
        config_from_hf(data | {"text_config": 3}, "mine")
    with pytest.raises(InvalidInput, match="text_config: mystery = 1 is not known"):
        config_from_hf(data | {"text_config": part | {"mystery": 1}}, "mine")


def test_an_alpha_stretches_theta_whatever_is_served() -> None:
    """As Hunyuan's files have it, whose other numbers next to it are not read; without it dynamic scaling is what it is."""
    data = SIZES | {"model_type": "hunyuan_v1_dense", "head_dim": 8, "num_key_value_heads": 4, "max_position_embeddings": 64}
    more = {"factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    found = config_from_hf(data | {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, **more}}, "mine")
    assert found.rotation == Rotation(1e4 * 1000.0 ** (8 / 6))
    assert isinstance(config_from_hf(data | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "mine").rotation.scaling, Dynamic)
    with pytest.raises(InvalidInput, match="alpha = -1; a number above 0"):
        config_from_hf(data | {"rope_scaling": {"type": "dynamic", "alpha": -1}}, "mine")


def test_which_layers_have_experts() -> None:
    """Leading layers, every n-th, those that are listed, or as the types of all say; a model that has none is dense."""

    def mixed(data: dict[str, Any]) -> list[bool]:
        model = config_from_hf(SIZES | {"num_key_value_heads": 4} | data, "mine")
        return [model.layer_kinds[number].experts is not None for number in model.kind_of_layers]

    qwen = {"model_type": "qwen3_moe"}
    assert mixed(qwen) == [True] * 4
    assert mixed(qwen | {"mlp_only_layers": [0, 3]}) == [False, True, True, False]
    assert mixed(qwen | {"decoder_sparse_step": 2}) == [False, True] * 2
    assert mixed(qwen | {"decoder_sparse_step": 5}) == [False] * 4
    assert mixed({"model_type": "glm4_moe", "first_k_dense_replace": 3}) == [False] * 3 + [True]
    assert mixed({"model_type": "ernie4_5_moe", "moe_layer_start_index": 1, "moe_layer_end_index": 2}) == [False, True, True, False]
    assert mixed({"model_type": "exaone_moe", "mlp_layer_types": ["dense", "sparse"] * 2}) == [False, True] * 2
    for wrong, message in (
        ({"mlp_only_layers": [0.5]}, "a list of numbers of layers"),
        ({"decoder_sparse_step": 0}, "at least 1 is needed"),
    ):
        with pytest.raises(InvalidInput, match=message):
            mixed(qwen | wrong)
    with pytest.raises(InvalidInput, match="dense or sparse for each of 4 layers"):
        mixed({"model_type": "exaone_moe", "mlp_layer_types": ["dense"]})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_experts_per_tok": 9, "num_experts": 8}, "per_token = 9 of 8 experts"),
        ({"num_experts": "many"}, 'num_experts = "many"; a whole number is needed'),
        ({"norm_topk_prob": 1}, "norm_topk_prob = 1; true or false is needed"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size = 8 is not known"),
    ],
)
def test_what_is_wrong_with_experts_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        config_from_hf(SIZES | {"model_type": "qwen3_moe", "num_key_value_heads": 4} | change, "mine")
    assert len(caught.value.offences) == 1
