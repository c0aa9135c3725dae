"""The models of the matrix: for every family, tiny sizes drawn from a seed and what makes the family different.

It needs nothing but the standard library, for both interpreters import it: the one with transformers, which makes the models, and that of
this library. Windows of 12 positions, rotations trained for 24 and prompts of up to 60 tokens make every model cross what it has.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

WINDOW, TRAINED, LONGEST = 12, 24, 96
Config = dict[str, Any]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}


def rope(theta: float = 10000.0, **more: Any) -> Config:
    return {"rope_parameters": {"rope_theta": theta, **({"rope_type": "default"} | more)}}


def longrope(sizes: Config) -> Config:
    pairs = sizes["head_dim"] // 2
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(pairs)], "long_factor": [1.5 + 0.5 * i for i in range(pairs)]}
    return rope(rope_type="longrope", factor=4.0, original_max_position_embeddings=TRAINED, **factors)


def drawn(seed: int) -> Config:
    """Sizes under Llama's names, `head_dim` among them; the width is that of all heads."""
    of = random.Random(seed)
    kv_heads, group, head_dim = of.choice((1, 2, 3)), of.choice((2, 3)), of.choice((8, 16))
    heads = kv_heads * group
    return {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": of.choice((48, 72, 96)),
        "num_hidden_layers": of.choice((2, 3)),
        "vocab_size": of.randrange(90, 150),
        "max_position_embeddings": LONGEST,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }


def llama(**more: Any) -> Callable[[Config], Config]:
    """A family with Llama's names for its sizes."""
    return lambda sizes: sizes | more


def derived(**more: Any) -> Callable[[Config], Config]:
    """The same without a head size of its own."""
    return lambda sizes: {key: value for key, value in sizes.items() if key != "head_dim"} | more


def multihead(**more: Any) -> Callable[[Config], Config]:
    """The same with as many key-value heads as query heads, and no key for either."""
    return lambda sizes: {key: value for key, value in sizes.items() if key not in ("head_dim", "num_key_value_heads")} | more


def falcon(**more: Any) -> Callable[[Config], Config]:
    """Falcon's names: the number of key-value heads counts with the new architecture alone."""

    def made(sizes: Config) -> Config:
        heads = {"num_kv_heads": sizes["num_key_value_heads"]} if more.get("new_decoder_architecture") else {}
        return {key: value for key, value in multihead()(sizes).items() if key != "intermediate_size"} | heads | more

    return made


def gpt(**more: Any) -> Callable[[Config], Config]:
    """A family with GPT-2's names for its sizes."""

    def made(sizes: Config) -> Config:
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        names |= {"max_position_embeddings": "n_positions", "intermediate_size": "n_inner"}
        kept = ("vocab_size", "bos_token_id", "eos_token_id")
        return {names.get(key, key): value for key, value in sizes.items() if key in (*names, *kept)} | more

    return made


def layers(types: tuple[str, ...], count: int, **more: Any) -> Config:
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    return {
        "num_hidden_layers": count,
        "layer_types": [kinds[types[i % len(types)]] for i in range(count)],
        "sliding_window": WINDOW,
        **more,
    }


# What is changed in a directory after it was saved: keys of its config.json, and the beginnings of its tensors' names.
WRITTEN, RENAMED = "_written", "_renamed"
CHOSEN = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 2}

Case = tuple[str, Callable[[Config], Config]]
CASES: Mapping[str, Case] = {
    "llama": ("llama", llama()),
    "llama, tied": ("llama", llama(tie_word_embeddings=True)),
    "llama, attention biases": ("llama", llama(attention_bias=True)),
    "llama, feed-forward biases": ("llama", llama(mlp_bias=True)),
    "llama, GELU": ("llama", llama(hidden_act="gelu")),
    "llama, Llama 3 rotation": ("llama", llama(**rope(500.0, **LLAMA3))),
    "llama, linear rotation": ("llama", llama(**rope(rope_type="linear", factor=4.0))),
    "llama, dynamic rotation": ("llama", llama(max_position_embeddings=TRAINED, **rope(rope_type="dynamic", factor=4.0))),
    "llama, YaRN": ("llama", llama(**rope(**YARN))),
    "llama, YaRN not truncated": ("llama", llama(**rope(**YARN, truncate=False, beta_fast=8.0))),
    "llama, YaRN with mscale": ("llama", llama(**rope(**YARN, mscale=1.0, mscale_all_dim=0.5))),
    "llama, LongRoPE": ("llama", lambda sizes: sizes | longrope(sizes)),
    "mistral": ("mistral", llama(sliding_window=None)),
    "mistral, window": ("mistral", llama(sliding_window=WINDOW)),
    "ministral": ("ministral", llama(**layers(("f", "s"), 4))),
    "ministral3": ("ministral3", llama(**rope(**YARN, llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0))),
    "mistral3": (
        "mistral3",
        lambda sizes: {"text_config": sizes | {"model_type": "mistral"}, "vision_config": vision(), "spatial_merge_size": 1},
    ),
    "qwen2": ("qwen2", derived()),
    "qwen2, window": ("qwen2", derived(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "qwen2, YaRN": ("qwen2", derived(**rope(1e6, **YARN))),
    "qwen3": ("qwen3", llama(tie_word_embeddings=True)),
    "qwen3, biases": ("qwen3", llama(attention_bias=True)),
    "qwen3, window": ("qwen3", llama(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "gemma": ("gemma", llama()),
    "gemma2": ("gemma2", llama(num_hidden_layers=4, sliding_window=WINDOW, query_pre_attn_scalar=24)),
    "gemma3_text": ("gemma3_text", lambda sizes: gemma3(sizes)),
    "gemma3": ("gemma3", lambda sizes: {"text_config": gemma3(sizes), "vision_config": vision(), "mm_tokens_per_image": 4}),
    "vaultgemma": ("vaultgemma", llama(num_hidden_layers=4, sliding_window=WINDOW, query_pre_attn_scalar=24)),
    "phi3": ("phi3", derived(original_max_position_embeddings=LONGEST)),
    "phi3, partial": ("phi3", derived(original_max_position_embeddings=LONGEST, partial_rotary_factor=0.5)),
    "phi3, LongRoPE": ("phi3", lambda sizes: derived(**phi3_longrope(sizes))(sizes)),
    "phi3, window": ("phi3", derived(original_max_position_embeddings=LONGEST, sliding_window=WINDOW)),
    "phi": ("phi", derived(partial_rotary_factor=0.5)),
    "olmo": ("olmo", derived()),
    "olmo, clipped": ("olmo", derived(clip_qkv=0.5)),
    "olmo2": ("olmo2", derived()),
    "olmo3": ("olmo3", derived(num_hidden_layers=4, sliding_window=WINDOW)),
    "olmo3, YaRN": ("olmo3", derived(num_hidden_layers=4, sliding_window=WINDOW, rope_scaling=YARN)),
    "granite": ("granite", derived(embedding_multiplier=6.0, logits_scaling=2.0, residual_multiplier=0.3, attention_multiplier=0.2)),
    "hyperclovax": ("hyperclovax", llama(embedding_multiplier=3.0, logits_scaling=0.5, residual_multiplier=0.4, attention_multiplier=0.2)),
    "smollm3": ("smollm3", derived(num_hidden_layers=5)),
    "smollm3, listed": ("smollm3", derived(num_hidden_layers=3, no_rope_layers=[1, 0, 1])),
    "smollm3, window": ("smollm3", derived(num_hidden_layers=4, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=WINDOW)),
    "gpt_neox": ("gpt_neox", multihead(use_parallel_residual=True, **rope(partial_rotary_factor=0.5))),
    "gpt_neox, serial": ("gpt_neox", multihead(use_parallel_residual=False, **rope(partial_rotary_factor=0.25))),
    "gpt_neox, no attention biases": ("gpt_neox", multihead(attention_bias=False)),
    "starcoder2": ("starcoder2", derived()),
    "starcoder2, window": ("starcoder2", derived(sliding_window=WINDOW, use_bias=False)),
    "stablelm": ("stablelm", derived(partial_rotary_factor=0.25)),
    "stablelm, biases": ("stablelm", derived(use_qkv_bias=True, partial_rotary_factor=0.5)),
    "stablelm, parallel": ("stablelm", derived(use_parallel_residual=True)),
    "stablelm, norms of heads": ("stablelm", derived(qk_layernorm=True)),
    "nemotron": ("nemotron", llama(norm_eps=1e-5)),
    "nemotron, biases": ("nemotron", llama(attention_bias=True, mlp_bias=True)),
    "gptj": ("gptj", gpt(rotary_dim=4)),
    "codegen": ("codegen", lambda sizes: gpt(n_head=4, n_embd=4 * sizes["head_dim"], rotary_dim=4)(sizes)),
    "falcon": ("falcon", falcon(multi_query=True, parallel_attn=True, ffn_hidden_size=72)),
    "falcon, grouped": ("falcon", falcon(new_decoder_architecture=True)),
    "falcon, one norm": ("falcon", falcon(new_decoder_architecture=True, num_ln_in_parallel_attn=1)),
    "falcon, multihead": ("falcon", falcon(multi_query=False, parallel_attn=False, bias=True)),
    "gpt_bigcode": ("gpt_bigcode", gpt(multi_query=True)),
    "gpt_bigcode, multihead": ("gpt_bigcode", gpt(multi_query=False)),
    "cohere": ("cohere", derived(logit_scale=0.25)),
    "cohere, norms of heads": ("cohere", derived(use_qk_norm=True)),
    "cohere2": ("cohere2", derived(num_hidden_layers=5, sliding_window=WINDOW, logit_scale=0.5)),
    "glm": ("glm", llama()),
    "glm4": ("glm4", llama()),
    "helium": ("helium", llama()),
    "ernie4_5": ("ernie4_5", llama()),
    "ernie4_5, biases": ("ernie4_5", llama(use_bias=True)),
    "exaone4": ("exaone4", derived(num_hidden_layers=5, sliding_window=WINDOW, sliding_window_pattern=4)),
    "exaone4, no window": ("exaone4", derived(num_hidden_layers=2, sliding_window=None, layer_types=["full_attention"] * 2)),
    "seed_oss": ("seed_oss", llama()),
    "seed_oss, biases": ("seed_oss", llama(attention_out_bias=True, mlp_bias=True)),
    "arcee": ("arcee", llama()),
    "arcee, biases": ("arcee", llama(attention_bias=True, mlp_bias=True)),
    "jais2": ("jais2", llama()),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", llama()),
    "hunyuan_v1_dense, alpha": ("hunyuan_v1_dense", llama(**rope(rope_type="dynamic", alpha=50.0, factor=1.0))),
    "cwm": ("cwm", llama(num_hidden_layers=5, sliding_window=WINDOW)),
    "nanochat": ("nanochat", derived()),
    "gpt2": ("gpt2", gpt()),
    "gpt2, untied": ("gpt2", gpt(tie_word_embeddings=False)),
    "gpt2, scores by layer": ("gpt2", gpt(scale_attn_by_inverse_layer_idx=True)),
    "gpt_neo": ("gpt_neo", lambda sizes: gpt_neo(sizes)),
    "opt": ("opt", lambda sizes: opt(sizes)),
    "opt, GELU without biases": (
        "opt",
        lambda sizes: opt(sizes, activation_function="gelu", enable_bias=False, layer_norm_elementwise_affine=False),
    ),
    "opt, norms after": ("opt", lambda sizes: opt(sizes, do_layer_norm_before=False)),
    "biogpt": ("biogpt", multihead(pad_token_id=2)),
    "persimmon": ("persimmon", multihead()),
    "gpt_neox_japanese": ("gpt_neox_japanese", multihead()),
    # Mixtures of experts.
    "mixtral": ("mixtral", derived(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "mixtral, window": ("mixtral", derived(num_local_experts=5, num_experts_per_tok=3, sliding_window=WINDOW)),
    "qwen2_moe": ("qwen2_moe", derived(num_experts=6, shared_expert_intermediate_size=40, **CHOSEN)),
    "qwen2_moe, renormalised": (
        "qwen2_moe",
        derived(
            num_experts=4, shared_expert_intermediate_size=40, norm_topk_prob=True, num_hidden_layers=4, decoder_sparse_step=2, **CHOSEN
        ),
    ),
    "qwen3_moe": ("qwen3_moe", llama(num_experts=8, norm_topk_prob=True, **CHOSEN)),
    "qwen3_moe, dense layers": ("qwen3_moe", llama(num_experts=4, mlp_only_layers=[0, 2], num_hidden_layers=4, **CHOSEN)),
    "qwen3_moe, window": ("qwen3_moe", llama(num_experts=4, use_sliding_window=True, sliding_window=WINDOW, **CHOSEN)),
    "olmoe": ("olmoe", derived(num_experts=8, num_experts_per_tok=3)),
    "olmoe, renormalised": ("olmoe", derived(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)),
    "flex_olmo": ("flex_olmo", derived(num_experts=4, num_experts_per_tok=2)),
    "gpt_oss": (
        "gpt_oss",
        llama(num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW, **rope(150000.0, **YARN, truncate=False)),
    ),
    "gpt_oss, clamped": ("gpt_oss", llama(num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW, swiglu_limit=0.5)),
    "glm4_moe": ("glm4_moe", llama(n_routed_experts=8, use_qk_norm=True, attention_bias=True, **CHOSEN)),
    "glm4_moe, groups": (
        "glm4_moe",
        llama(
            n_routed_experts=8, n_group=4, topk_group=2, routed_scaling_factor=2.5, first_k_dense_replace=0, n_shared_experts=2, **CHOSEN
        ),
    ),
    "glm4_moe, not renormalised": (
        "glm4_moe",
        llama(n_routed_experts=4, norm_topk_prob=False, first_k_dense_replace=2, num_hidden_layers=4, **CHOSEN),
    ),
    "solar_open": ("solar_open", llama(n_routed_experts=4, **CHOSEN)),
    "dots1": ("dots1", derived(n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1, n_group=2, topk_group=1, **CHOSEN)),
    "exaone_moe": ("exaone_moe", derived(num_experts=4, num_hidden_layers=5, sliding_window=WINDOW, **CHOSEN)),
    "minimax_m2": ("minimax_m2", llama(num_local_experts=4, num_experts_per_tok=2, **rope(5e6, partial_rotary_factor=0.5))),
    "granitemoe": (
        "granitemoe",
        derived(num_local_experts=4, num_experts_per_tok=2, embedding_multiplier=6.0, logits_scaling=2.0, attention_multiplier=0.2),
    ),
    "granitemoeshared": (
        "granitemoeshared",
        derived(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=40, residual_multiplier=0.3, attention_multiplier=0.2),
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        derived(moe_num_experts=4, moe_k=2, moe_intermediate_size=24, moe_layer_start_index=1, moe_num_shared_experts=2),
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", llama(num_experts=4, moe_topk=2)),
    # Refused: what is not a decoder of attention and feed-forward alone, and positions that are neither learned nor rotated.
    "bloom": (
        "bloom",
        lambda s: {"vocab_size": s["vocab_size"], "hidden_size": s["hidden_size"], "n_layer": 2, "n_head": s["num_attention_heads"]},
    ),
    "mpt": (
        "mpt",
        lambda s: {"vocab_size": s["vocab_size"], "d_model": s["hidden_size"], "n_layers": 2, "n_heads": s["num_attention_heads"]},
    ),
    "falcon, ALiBi": ("falcon", falcon(alibi=True)),
    "mamba": ("mamba", lambda s: {"vocab_size": s["vocab_size"], "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "lfm2": ("lfm2", derived(full_attn_idxs=[1])),
    "bitnet": ("bitnet", derived()),
    "apertus": ("apertus", derived()),
    "gemma4_text": ("gemma4_text", llama(num_hidden_layers=4, sliding_window=WINDOW)),
    "deepseek_v2": ("deepseek_v2", multihead(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, **LATENT)),
    "deepseek_v3": ("deepseek_v3", multihead(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, **LATENT)),
    "phimoe": ("phimoe", derived(num_local_experts=4)),
    "jetmoe": ("jetmoe", derived(num_local_experts=4)),
    "mistral3, growing queries": (
        "mistral3",
        lambda sizes: {
            "text_config": sizes | rope(**YARN, llama_4_scaling_beta=0.4) | {"model_type": "ministral3"},
            "vision_config": vision(),
            "spatial_merge_size": 1,
        },
    ),
    "persimmon, no norms of heads": ("persimmon", multihead(qk_layernorm=False, hidden_act="gelu")),
    "opt, narrow tables": ("opt", lambda sizes: opt(sizes, word_embed_proj_dim=sizes["hidden_size"] // 2)),
    "opt, narrow tables, norms after": (
        "opt",
        lambda sizes: opt(sizes, word_embed_proj_dim=sizes["hidden_size"] // 2, do_layer_norm_before=False),
    ),
    "openai-gpt": ("openai-gpt", lambda sizes: {key: value for key, value in gpt()(sizes).items() if key != "n_inner"}),
    "llama, another output matrix than the one it ties": ("llama", llama(**{WRITTEN: {"tie_word_embeddings": True}})),
    "qwen3, tied by another name": ("qwen3", llama(tie_word_embeddings=True, **{RENAMED: ("model.embed_tokens.", "lm_head.")})),
    "qwen2, tensors of the base model": ("qwen2", derived(tie_word_embeddings=True, **{RENAMED: ("model.", "")})),
}


def vision() -> Config:
    return {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }


def gemma3(sizes: Config) -> Config:
    return sizes | layers(("s", "s", "f"), 5, query_pre_attn_scalar=24, rope_scaling={"rope_type": "linear", "factor": 8.0})


def phi3_longrope(sizes: Config) -> Config:
    return longrope(sizes) | {"original_max_position_embeddings": TRAINED}


def gpt_neo(sizes: Config) -> Config:
    names = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
    kept = ("vocab_size", "hidden_size", "max_position_embeddings", "bos_token_id", "eos_token_id")
    made = {names.get(key, key): value for key, value in sizes.items() if key in (*names, *kept)}
    return made | {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": WINDOW}


def opt(sizes: Config, **more: Any) -> Config:
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    made = {key: sizes[key] for key in kept} | {"ffn_dim": sizes["intermediate_size"], "word_embed_proj_dim": sizes["hidden_size"]}
    return made | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2} | more
