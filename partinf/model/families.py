"""The families of published models that are read, one declaration each: the keys of their `config.json` and the names of their tensors.

`hf_config` reads and writes configurations by a declaration, `checkpoint.hf_names` finds tensors by it, and nothing else in the library
knows a family's name: whatever a family changes in the computation is a field of `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from partinf.foundation.errors import InvalidInput, nearest
from partinf.model.config import MATRICES, Activation, ModelConfig, Norm, Position
from partinf.model.family import Family, Naming, Size, Stored, Window
from partinf.model.kinds import QkNorm


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys that change no logit, by the reason why. `hf_config` refuses every other key that it does not read.
_TRAINING = _keys("""
    attention_dropout hidden_dropout activation_dropout classifier_dropout dropout layerdrop attn_pdrop embd_pdrop resid_pdrop
    initializer_range initializer_factor init_std gradient_checkpointing neftune_noise_alpha finetuning_task problem_type
    id2label label2id num_labels
""")
_GENERATION = _keys("""
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    task_specific_params
""")
_TOKENS = _keys("""
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id tokenizer_class
    prefix
""")
_TYPES = _keys("torch_dtype dtype use_bfloat16")
_OUTPUTS = _keys("""
    use_cache return_dict output_attentions output_hidden_states output_past torchscript tf_legacy_loss is_decoder tie_encoder_decoder
    chunk_size_feed_forward
""")
_ORIGIN = _keys("""
    _name_or_path name_or_path _commit_hash transformers_version transformers.js_config unsloth_version unsloth_fixed
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation _flash_attn_2_enabled
""")
HARMLESS = _TRAINING | _GENERATION | _TOKENS | _TYPES | _OUTPUTS | _ORIGIN

# Keys of any family that change the result unless they have one of these values.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
}

_LLAMA_SIZES = {
    "num_layers": Size("num_hidden_layers"),
    "embed_dim": Size("hidden_size"),
    "ffn_dim": Size("intermediate_size"),
    "num_heads": Size("num_attention_heads"),
    "num_kv_heads": Size("num_key_value_heads", follows=True),
    "head_dim": Size("head_dim", follows=True),
    "vocab_size": Size("vocab_size"),
    "max_len": Size("max_position_embeddings", 2048),
}
_LLAMA_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
}
_LLAMA_NAMING = Naming(
    bases=("model.",),
    layer="{base}layers.{layer}.",
    layer_weights={
        "attention_norm": Stored("E", ("input_layernorm.weight",)),
        "wq": Stored("HQ E", ("self_attn.q_proj.weight",)),
        "wkv": Stored("KQ E", ("self_attn.k_proj.weight", "self_attn.v_proj.weight")),
        "q_norm": Stored("Q", ("self_attn.q_norm.weight",)),
        "k_norm": Stored("Q", ("self_attn.k_norm.weight",)),
        "wo": Stored("E (HQ)", ("self_attn.o_proj.weight",)),
        "ffn_norm": Stored("E", ("post_attention_layernorm.weight",)),
        "w_in": Stored("F E", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        "w_out": Stored("E F", ("mlp.down_proj.weight",)),
    },
    model_weights={
        "embed": Stored("V E", ("{base}embed_tokens.weight",)),
        "final_norm": Stored("E", ("{base}norm.weight",)),
        "unembed": Stored("V E", ("lm_head.weight",)),
    },
    buffers=("rotary_emb.inv_freq",),
)
_LLAMA = Family(
    title="Llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    sizes=_LLAMA_SIZES,
    norm_eps=("rms_norm_eps", 1e-6),
    tied=False,
    naming=_LLAMA_NAMING,
    only=_LLAMA_ONLY,
    harmless=_keys("pretraining_tp max_sequence_length is_llama_config"),  # the first cuts products into parts that are added again
    written=True,
)
_MISTRAL = replace(
    _LLAMA,
    title="Mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    sizes=_LLAMA_SIZES
    | {"num_kv_heads": Size("num_key_value_heads", 8, follows=True), "max_len": Size("max_position_embeddings", 4096 * 32)},
    window=Window(absent=4096),
)
_QWEN3 = replace(
    _LLAMA,
    title="Qwen 3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    sizes=_LLAMA_SIZES  # the defaults of these two are no function of the others
    | {"num_kv_heads": Size("num_key_value_heads"), "head_dim": Size("head_dim"), "max_len": Size("max_position_embeddings", 32768)},
    block={"qk_norm": QkNorm.HEAD},
    window=Window(absent=4096, flag="use_sliding_window", first=("max_window_layers", 28)),
)

_LAYER_NORM_BLOCK = {"gated": False, "norm": Norm.LAYER, "position": Position.LEARNED, "biases": MATRICES}
_GPT2 = Family(
    title="GPT-2",
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    sizes={
        "num_layers": Size("n_layer"),
        "embed_dim": Size("n_embd"),
        "num_heads": Size("n_head"),
        "vocab_size": Size("vocab_size"),
        "max_len": Size("n_positions"),
        "ffn_dim": Size("n_inner", follows=True),
    },
    norm_eps=("layer_norm_epsilon", 1e-5),
    tied=True,
    naming=Naming(
        bases=("transformer.", ""),  # the published gpt2 has none
        layer="{base}h.{layer}.",
        layer_weights={
            "attention_norm": Stored("E", ("ln_1.weight",)),
            "attention_norm_bias": Stored("E", ("ln_1.bias",)),
            "wq": Stored("HQ E", ("attn.c_attn.weight",), thirds=(0,), transposed=True),
            "bq": Stored("HQ", ("attn.c_attn.bias",), thirds=(0,)),
            "wkv": Stored("KQ E", ("attn.c_attn.weight",) * 2, thirds=(1, 2), transposed=True),
            "bkv": Stored("KQ", ("attn.c_attn.bias",) * 2, thirds=(1, 2)),
            "wo": Stored("E (HQ)", ("attn.c_proj.weight",), transposed=True),
            "bo": Stored("E", ("attn.c_proj.bias",)),
            "ffn_norm": Stored("E", ("ln_2.weight",)),
            "ffn_norm_bias": Stored("E", ("ln_2.bias",)),
            "w_in": Stored("1F E", ("mlp.c_fc.weight",), transposed=True),
            "b_in": Stored("1F", ("mlp.c_fc.bias",)),
            "w_out": Stored("E F", ("mlp.c_proj.weight",), transposed=True),
            "b_out": Stored("E", ("mlp.c_proj.bias",)),
        },
        model_weights={
            "embed": Stored("V E", ("{base}wte.weight",)),
            "positions": Stored("M E", ("{base}wpe.weight",)),
            "final_norm": Stored("E", ("{base}ln_f.weight",)),
            "final_norm_bias": Stored("E", ("{base}ln_f.bias",)),
        },
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "n_special": (0,),
    },
    # Names that other families have for the same sizes.
    equal=(
        ("hidden_size", "n_embd"),
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
        ("max_position_embeddings", "n_positions"),
    ),
    block=_LAYER_NORM_BLOCK | {"activation": Activation.GELU_TANH},
    # The head of a classifier, an older name of n_positions, and the order in which float32 scores are made.
    harmless=_keys("""
        summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj n_ctx reorder_and_upcast_attn
        predict_special_tokens
    """),
)
_OPT = Family(
    title="OPT",
    architecture="OPTForCausalLM",
    model_type="opt",
    sizes={
        "num_layers": Size("num_hidden_layers"),
        "embed_dim": Size("hidden_size"),
        "ffn_dim": Size("ffn_dim"),
        "num_heads": Size("num_attention_heads"),
        "vocab_size": Size("vocab_size"),
        "max_len": Size("max_position_embeddings"),
    },
    norm_eps=("", 1e-5),
    tied=True,
    naming=Naming(
        bases=("model.decoder.", "decoder."),
        layer="{base}layers.{layer}.",
        layer_weights={
            "attention_norm": Stored("E", ("self_attn_layer_norm.weight",)),
            "attention_norm_bias": Stored("E", ("self_attn_layer_norm.bias",)),
            "wq": Stored("HQ E", ("self_attn.q_proj.weight",)),
            "bq": Stored("HQ", ("self_attn.q_proj.bias",)),
            "wkv": Stored("KQ E", ("self_attn.k_proj.weight", "self_attn.v_proj.weight")),
            "bkv": Stored("KQ", ("self_attn.k_proj.bias", "self_attn.v_proj.bias")),
            "wo": Stored("E (HQ)", ("self_attn.out_proj.weight",)),
            "bo": Stored("E", ("self_attn.out_proj.bias",)),
            "ffn_norm": Stored("E", ("final_layer_norm.weight",)),
            "ffn_norm_bias": Stored("E", ("final_layer_norm.bias",)),
            "w_in": Stored("1F E", ("fc1.weight",)),
            "b_in": Stored("1F", ("fc1.bias",)),
            "w_out": Stored("E F", ("fc2.weight",)),
            "b_out": Stored("E", ("fc2.bias",)),
        },
        model_weights={
            "embed": Stored("V E", ("{base}embed_tokens.weight",)),
            "positions": Stored("M E", ("{base}embed_positions.weight",), skip=2),  # fairseq's padding, which no token is given
            "final_norm": Stored("E", ("{base}final_layer_norm.weight",)),
            "final_norm_bias": Stored("E", ("{base}final_layer_norm.bias",)),
            "unembed": Stored("V E", ("lm_head.weight",)),
        },
    ),
    only={
        "activation_function": ("relu",),
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "enable_bias": (True,),
        "layer_norm_elementwise_affine": (True,),
    },
    equal=(("word_embed_proj_dim", "hidden_size"),),
    block=_LAYER_NORM_BLOCK | {"activation": Activation.RELU},
    harmless=_keys("output_projection"),  # whether a file has an output matrix of its own, which the file says itself
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (_LLAMA, _MISTRAL, _QWEN3, _GPT2, _OPT)}


def family_of(config: ModelConfig) -> Family:
    """The family that the model's source named; of a model that names none, the first whose blocks it has.

    Raises:
        InvalidInput: blocks that no family has, or others than those of the named family.
    """
    if config.family:
        return FAMILIES[config.family]
    for family in FAMILIES.values():
        if not family.differences(config):
            return family
    known = ", ".join(family.title for family in FAMILIES.values())
    raise InvalidInput(f"model {config.name}: no Hugging Face family has such blocks; known families: {known}")


def family_offences(config: ModelConfig) -> list[str]:
    """What keeps an architecture from being of the family that it names."""
    if config.family not in FAMILIES:
        return [f"model {config.name}: unknown family '{config.family}'{nearest(config.family, FAMILIES)}"]
    family = FAMILIES[config.family]
    return [
        f"model {config.name}: {key} = {getattr(config, key)!s}; the family {family.title} has {value!s}"
        for key, value in family.differences(config).items()
    ]
