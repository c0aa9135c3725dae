"""What configurations of the newer families mean: defaults, kinds of layers, blocks that several keys decide together."""

from __future__ import annotations

from typing import Any

import pytest

from partinf.foundation.errors import InvalidInput
from partinf.model.config import Block
from partinf.model.hf_config import config_from_hf
from partinf.model.rotation import Linear, Rotation

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
    """Sizes that the part leaves out are the family's; images are said not to be read."""
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
