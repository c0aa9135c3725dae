"""Hugging Face `config.json`: read for every supported family, written for those that rotate.

A family is data: the keys that hold its sizes, what they default to, what its blocks always are, and the only values of other keys that
mean the model which this library computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from partinf.errors import InvalidInput, raise_offences
from partinf.model.config import Activation, Block, ModelConfig, Norm, Position, RopeScaling


@dataclass(frozen=True)
class _Family:
    """How one family writes its configuration.

    Attributes:
        sizes: whole numbers that must be there, `ModelConfig` field → key.
        optional: whole numbers that may be absent or null, field → (key, the value then; None where it follows from other sizes).
        norm_eps: key and default of the norms' epsilon; no key where it is fixed.
        tied: whether embeddings are tied where the file does not say.
        only: key → the values that are supported, the default among them.
        equal: pairs of keys that must agree where the first is given.
        block: fields of `ModelConfig` that the family fixes.
    """

    sizes: Mapping[str, str]
    optional: Mapping[str, tuple[str, int | None]]
    norm_eps: tuple[str, float]
    tied: bool
    only: Mapping[str, tuple[Any, ...]]
    equal: tuple[tuple[str, str], ...] = ()
    block: Mapping[str, Any] = field(default_factory=dict)


_LLAMA_SIZES = {
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_LAYER_NORM_BLOCK = {"gated": False, "norm": Norm.LAYER, "position": Position.LEARNED, "biases": True}
_LLAMA = _Family(
    sizes=_LLAMA_SIZES,
    optional={
        "num_kv_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "max_len": ("max_position_embeddings", 2048),
    },
    norm_eps=("rms_norm_eps", 1e-6),
    tied=False,
    only={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
)
_QWEN3 = _Family(
    sizes=_LLAMA_SIZES | {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"},  # whose defaults are no function of the others
    optional={"max_len": ("max_position_embeddings", 32768)},
    norm_eps=("rms_norm_eps", 1e-6),
    tied=False,
    only={"hidden_act": ("silu",), "attention_bias": (False,)},
    block={"qk_norm": True},
)
_GPT2 = _Family(
    sizes={"num_layers": "n_layer", "embed_dim": "n_embd", "num_heads": "n_head", "vocab_size": "vocab_size", "max_len": "n_positions"},
    optional={"ffn_dim": ("n_inner", None)},
    norm_eps=("layer_norm_epsilon", 1e-5),
    tied=True,
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    block=_LAYER_NORM_BLOCK | {"activation": Activation.GELU_TANH},
)
_OPT = _Family(
    sizes={
        "num_layers": "num_hidden_layers",
        "embed_dim": "hidden_size",
        "ffn_dim": "ffn_dim",
        "num_heads": "num_attention_heads",
        "vocab_size": "vocab_size",
        "max_len": "max_position_embeddings",
    },
    optional={},
    norm_eps=("", 1e-5),
    tied=True,
    only={
        "activation_function": ("relu",),
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "enable_bias": (True,),
        "layer_norm_elementwise_affine": (True,),
    },
    equal=(("word_embed_proj_dim", "hidden_size"),),
    block=_LAYER_NORM_BLOCK | {"activation": Activation.RELU},
)
# (architecture, model_type) → family; either name is enough.
_FAMILIES: Mapping[tuple[str, str], _Family] = {
    ("LlamaForCausalLM", "llama"): _LLAMA,
    ("MistralForCausalLM", "mistral"): _LLAMA,
    ("Qwen3ForCausalLM", "qwen3"): _QWEN3,
    ("GPT2LMHeadModel", "gpt2"): _GPT2,
    ("OPTForCausalLM", "opt"): _OPT,
}


def config_from_hf(data: Mapping[str, Any], name: str) -> ModelConfig:
    """Read a Hugging Face `config.json` of a supported family, as transformers 4 or 5 writes it.

    Version 5 writes `rope_parameters` and `dtype` where version 4 wrote `rope_theta`, `rope_scaling` and `torch_dtype`.

    Raises:
        InvalidInput: another architecture, missing keys, a rope type or option that is not supported; all at once.
    """
    family = _family(data, name)
    offences: list[str] = []
    keys = dict(family.sizes) | {size: key for size, (key, _) in family.optional.items() if data.get(key) is not None}
    for key in keys.values():
        if not isinstance(data.get(key), int) or isinstance(data.get(key), bool):
            offences.append(f"{name}: config.json: {key} = {json.dumps(data.get(key))}; a whole number is needed")
    offences += _unsupported(data, name, family)
    fields: dict[str, Any] = dict(family.block)
    if fields.get("position", Position.ROPE) is Position.ROPE:
        fields["rope_theta"], fields["rope_scaling"] = _rope_from_hf(data, name, offences)
    raise_offences(offences)
    sizes = {size: default for size, (_, default) in family.optional.items()} | {size: data[key] for size, key in keys.items()}
    eps_key, eps = family.norm_eps
    return ModelConfig(
        name=name,
        norm_eps=float(data.get(eps_key, eps)),
        tied_embeddings=bool(data.get("tie_word_embeddings", family.tied)),
        source="config.json",
        **_derived(sizes, name),
        **fields,
    )


def _family(data: Mapping[str, Any], name: str) -> _Family:
    architecture, model_type = (data.get("architectures") or [None])[0], data.get("model_type")
    for names, family in _FAMILIES.items():
        if architecture == names[0]:
            return family
    for names, family in _FAMILIES.items():
        if model_type == names[1]:
            return family
    supported = ", ".join(known for known, _ in _FAMILIES)
    raise InvalidInput(f"{name}: config.json describes {architecture or model_type!r}; supported architectures: {supported}")


def _unsupported(data: Mapping[str, Any], name: str, family: _Family) -> list[str]:
    offences = []
    for key, supported in family.only.items():
        if key in data and data[key] not in supported and not (data[key] is None and False in supported):
            values = ", ".join(json.dumps(value) for value in supported)
            offences.append(f"{name}: config.json: {key} = {json.dumps(data[key])} is not supported; supported: {values}")
    for key, other in family.equal:
        if data.get(key) is not None and data[key] != data.get(other):
            offences.append(f"{name}: config.json: {key} = {data[key]} is not supported; it must equal {other} = {data.get(other)}")
    if data.get("sliding_window") and data.get("use_sliding_window", True):
        offences.append(f"{name}: config.json: sliding_window = {data['sliding_window']} is not supported")
    return offences


def _derived(sizes: Mapping[str, Any], name: str) -> dict[str, Any]:
    """All sizes; those that are absent or None follow from the others."""
    embed, heads = sizes["embed_dim"], max(sizes["num_heads"], 1)  # ModelConfig refuses what is below 1
    if sizes.get("head_dim") is None and embed % heads:
        raise InvalidInput(f"{name}: config.json: a width of {embed} does not divide into {heads} heads")
    follow = {"ffn_dim": 4 * embed, "num_kv_heads": heads, "head_dim": embed // heads}
    return follow | {size: value for size, value in sizes.items() if value is not None}


def _rope_from_hf(data: Mapping[str, Any], name: str, offences: list[str]) -> tuple[float, RopeScaling | None]:
    rope = dict(data.get("rope_parameters") or data.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta", data.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return theta, None
    if kind != "llama3":
        offences.append(f"{name}: config.json: rope type {kind!r} is not supported; supported: 'default', 'llama3'")
        return theta, None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in keys if key not in rope]
    if missing:
        offences.append(f"{name}: config.json: llama3 rope scaling lacks {', '.join(missing)}")
        return theta, None
    factor, low, high = (float(rope[key]) for key in keys[:3])
    return theta, RopeScaling(factor, low, high, int(rope[keys[3]]))


_WRITABLE: Mapping[str, Any] = {
    "block": Block.SERIAL,
    "gated": True,
    "activation": Activation.SILU,
    "norm": Norm.RMS,
    "position": Position.ROPE,
    "biases": False,
}


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that both transformers 4 and 5 read; the inverse of `config_from_hf` for the Llama family and Qwen 3.

    Raises:
        InvalidInput: a block that neither of them has.
    """
    raise_offences(
        f"model {config.name}: {key} = {json.dumps(getattr(config, key))}; Hugging Face directories are written for Llama and Qwen 3 only, "
        f"whose {key} is {json.dumps(value)}; save with orbax"
        for key, value in _WRITABLE.items()
        if getattr(config, key) != value
    )
    data: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_len,
        "attention_bias": False,
        "mlp_bias": False,
    }
    if config.rope_scaling:
        scaling = config.rope_scaling
        data["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_len,
        }
    return data
