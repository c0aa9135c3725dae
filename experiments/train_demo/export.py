"""The demo model as a Hugging Face Llama directory: configuration, weights and tokenizer files.

Weights are rounded to bfloat16, which halves the file; what is evaluated is the model read back from that file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from model import DemoConfig, DemoModel
from safetensors.numpy import load_file, save_file
from tokenizer import BOS, EOS, PAD, UNK

WEIGHTS_FILE = "model.safetensors"
PIECES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def leaf_names(config: DemoConfig) -> dict[str, tuple[str, int | slice | None]]:
    """Hugging Face tensor name to (attribute path in `DemoModel`, index into its leading dimension or None for the whole leaf)."""
    names: dict[str, tuple[str, int | slice | None]] = {
        "model.embed_tokens.weight": ("embed", None),
        "model.norm.weight": ("final_norm", None),
        "lm_head.weight": ("unembed", None),
    }
    per_layer = {
        "input_layernorm": ("attention_norm", None),
        "self_attn.q_proj": ("wq", None),
        "self_attn.k_proj": ("wkv", 0),
        "self_attn.v_proj": ("wkv", 1),
        "self_attn.o_proj": ("wo", None),
        "post_attention_layernorm": ("ffn_norm", None),
        "mlp.gate_proj": ("w_in", 0),
        "mlp.up_proj": ("w_in", 1),
        "mlp.down_proj": ("w_out", None),
    }
    for layer in range(config.num_layers):
        for name, (leaf, index) in per_layer.items():
            names[f"model.layers.{layer}.{name}.weight"] = (f"layers.{layer}.{leaf}", index)
    return names


def leaf(model: DemoModel, path: str) -> nnx.Param:
    """The parameter at an attribute path such as "layers.0.wq"."""
    node: Any = model
    for part in path.split("."):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node


def hugging_face_shape(name: str, config: DemoConfig) -> tuple[int, ...]:
    """Two-dimensional [out, in] shape (one-dimensional for norms) of a Hugging Face tensor."""
    e, f, h, k, q, v = config.d_model, config.d_ff, config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size
    shapes = {"q_proj": (h * q, e), "k_proj": (k * q, e), "v_proj": (k * q, e), "o_proj": (e, h * q), "gate_proj": (f, e)}
    shapes |= {"up_proj": (f, e), "down_proj": (e, f), "embed_tokens": (v, e), "lm_head": (v, e)}
    return shapes.get(name.split(".")[-2], (e,))


def save_weights(model: DemoModel, path: Path) -> None:
    """Write `model` rounded to bfloat16 under Hugging Face's tensor names."""
    tensors = {}
    for name, (leaf_path, index) in leaf_names(model.config).items():
        value = leaf(model, leaf_path)[...]
        value = value if index is None else value[index]
        tensors[name] = np.asarray(value.reshape(hugging_face_shape(name, model.config)).astype(jnp.bfloat16))
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable by its owner only


def load_weights(config: DemoConfig, path: Path) -> DemoModel:
    """Read a model back from `save_weights`, as float32."""
    model = DemoModel(config, nnx.Rngs(0))
    tensors = load_file(path)
    for name, (leaf_path, index) in leaf_names(config).items():
        param = leaf(model, leaf_path)
        value = jnp.asarray(tensors[name], jnp.float32)
        if index is None:
            param[...] = value.reshape(param[...].shape)
        else:
            param[...] = param[...].at[index].set(value.reshape(param[...].shape[1:]))
    return model


def model_config(config: DemoConfig) -> dict[str, Any]:
    """The config.json of a Llama with these dimensions."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_len,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
    }


def tokenizer_config(config: DemoConfig) -> dict[str, Any]:
    """The tokenizer_config.json that belongs to `tokenizer.train_tokenizer`: BOS in front, no EOS behind, no added space."""
    special = {str(index): piece for index, piece in zip((UNK, BOS, EOS, PAD), PIECES.values(), strict=True)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "LlamaTokenizer",
        **PIECES,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": config.max_len,
        "added_tokens_decoder": {index: {"content": piece, **flags} for index, piece in special.items()},
    }


def write_configs(config: DemoConfig, folder: Path) -> None:
    """Write config.json, generation_config.json and tokenizer_config.json."""
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False, "max_new_tokens": 24}
    files = {"config": model_config(config), "generation_config": generation, "tokenizer_config": tokenizer_config(config)}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
