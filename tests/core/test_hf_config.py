"""Hugging Face configurations: what is read of each family, what is written, and everything that is refused."""

from __future__ import annotations

from typing import Any

import pytest

from partinf.foundation.errors import InvalidInput
from partinf.model.config import MATRICES, Activation, ModelConfig, Norm, Position
from partinf.model.hf_config import config_from_hf
from partinf.model.hf_write import config_to_hf
from partinf.model.kinds import NormPlaces
from partinf.model.load import config_from_toml, load_model_config
from partinf.model.weights import num_params

REQUIRED = "num_layers = 2\nembed_dim = 64\nffn_dim = 192\nnum_heads = 8\nnum_kv_heads = 4\nhead_dim = 8\nvocab_size = 512\n"
# As published, without the fields that say nothing of the architecture.
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
OPT = {
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "do_layer_norm_before": True,
    "ffn_dim": 20480,
    "hidden_size": 5120,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "vocab_size": 50272,
    "word_embed_proj_dim": 5120,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def offences(data: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(InvalidInput) as caught:
        config_from_hf(data, "mine")
    return tuple(line.removeprefix("mine: config.json").lstrip(": ") for line in caught.value.offences)


def test_gpt2() -> None:
    layer_norm: dict[str, Any] = {"norm": Norm.LAYER, "position": Position.LEARNED, "biases": MATRICES, "gated": False}
    found = config_from_hf(GPT2, "gpt2")
    assert found == ModelConfig(
        "gpt2", 12, 768, 3072, 12, 12, 64, 50257,
        activation=Activation.GELU_TANH, tied_embeddings=True, max_len=1024, family="gpt2", source="config.json", **layer_norm,
    )  # fmt: skip
    assert num_params(found) == 124_439_808  # as transformers counts them
    assert config_from_hf(GPT2 | {"n_inner": 1000}, "gpt2").ffn_dim == 1000


@pytest.mark.parametrize("data, shipped", [(OPT, "opt-13b"), (QWEN3, "qwen-3-8b")])
def test_published_files_are_the_shipped_models(data: dict[str, Any], shipped: str) -> None:
    ours = load_model_config(shipped)
    found = config_from_hf(data, shipped)
    differing = {key for key, value in vars(ours).items() if getattr(found, key) != value}
    assert differing <= {"source"}


def test_either_name_of_a_family_is_enough() -> None:
    by_type = {key: value for key, value in GPT2.items() if key != "architectures"}
    by_architecture = {key: value for key, value in GPT2.items() if key != "model_type"}
    assert config_from_hf(by_type, "gpt2") == config_from_hf(by_architecture, "gpt2") == config_from_hf(GPT2, "gpt2")


def test_an_unknown_architecture_names_those_that_are_read() -> None:
    words = r"describes 'whisper'; supported model types: arcee, .*gpt2, .*llama, .*opt, .*qwen3, .*vaultgemma"
    with pytest.raises(InvalidInput, match=words):
        config_from_hf({"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}, "mine")


@pytest.mark.parametrize(
    "model_type, why", [("bloom", "ALiBi"), ("mamba", "recurrent state"), ("phimoe", "router"), ("deepseek_v3", "latent")]
)
def test_what_is_known_and_not_read_says_why(model_type: str, why: str) -> None:
    (line,) = offences({"model_type": model_type})
    assert line.startswith(f"describes '{model_type}'; ")
    assert why in line


def test_every_offence_of_gpt2_at_once() -> None:
    bad = {"n_layer": "12", "activation_function": "tanh", "scale_attn_by_inverse_layer_idx": True, "n_special": 2}
    assert offences(GPT2 | bad) == (
        'n_layer = "12"; a whole number is needed',
        "scale_attn_by_inverse_layer_idx = true is not supported; supported: false",
        "n_special = 2 is not supported; supported: 0",
        'activation_function = "tanh" is not supported; supported: "silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", '
        '"relu", "relu2"',
    )
    (found,) = offences(GPT2 | {"n_head": 13})
    assert "768 does not divide into 13 heads" in found


def test_every_offence_of_opt_at_once() -> None:
    bad = {"do_layer_norm_before": 0, "word_embed_proj_dim": "wide", "enable_bias": 0, "ffn_dim": None}
    assert offences(OPT | bad) == (
        "ffn_dim = null; a whole number is needed",
        'word_embed_proj_dim = "wide"; a whole number is needed',
        "do_layer_norm_before = 0 is not supported; supported: true, false",
        "enable_bias = 0; true or false is needed",
    )
    assert not config_from_hf(OPT | {"tie_word_embeddings": False}, "opt").tied_embeddings


def test_opt_350m_norms_sums_and_projects_its_embeddings() -> None:
    """One narrow table on disk is two of the model's width; a second narrow one is none that transformers ties."""
    found = config_from_hf(OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 512}, "opt")
    assert (found.norms, found.final_norm, found.table_dim, found.tied_embeddings) == (NormPlaces.SUM, False, 512, False)
    assert config_from_hf(OPT | {"_remove_final_layer_norm": True}, "opt").final_norm is False
    (message,) = offences(OPT | {"word_embed_proj_dim": 512, "tie_word_embeddings": False})
    assert message.endswith("word_embed_proj_dim = 512 is not supported with an output matrix of its own")


def test_every_offence_of_qwen3_at_once() -> None:
    bad = {"attention_bias": "yes", "use_sliding_window": True, "max_window_layers": 28, "sliding_window": "4096", "head_dim": None}
    assert offences(QWEN3 | bad) == (
        "head_dim = null; a whole number is needed",
        'attention_bias = "yes"; true or false is needed',
        'sliding_window = "4096"; a whole number of at least 1, or null, is needed',
    )


def test_blocks_of_no_family_are_not_written() -> None:
    with pytest.raises(InvalidInput, match="no Hugging Face family has such blocks"):
        config_to_hf(load_model_config("palm-8b"))


@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_hugging_face_round_trip(qk_norm: str) -> None:
    config = config_from_toml(REQUIRED + f'max_len = 128\nqk_norm = "{qk_norm}"\n', "mine")
    again = config_from_hf(config_to_hf(config), "mine")
    assert num_params(again) == num_params(config)
    assert (again.embed_dim, again.num_kv_heads, again.max_len) == (64, 4, 128)


def test_hugging_face_offences_at_once() -> None:
    data = config_to_hf(config_from_toml(REQUIRED, "mine")) | {"hidden_size": "64", "hidden_act": "tanh", "attention_bias": 1}
    data |= {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn"}}
    with pytest.raises(InvalidInput) as caught:
        config_from_hf(data, "mine")
    assert len(caught.value.offences) == 4
