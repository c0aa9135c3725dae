"""Keys of a `config.json` that change no logit, by the reason why, and those that any family has with one value alone.

`hf_config` refuses every other key that it does not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def keys(text: str) -> frozenset[str]:
    """Names separated by white space."""
    return frozenset(text.split())


_TRAINING = keys("""
    attention_dropout hidden_dropout activation_dropout classifier_dropout dropout layerdrop attn_pdrop embd_pdrop resid_pdrop
    initializer_range initializer_factor init_std gradient_checkpointing neftune_noise_alpha finetuning_task problem_type
    id2label label2id num_labels
""")
_GENERATION = keys("""
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    task_specific_params
""")
_TOKENS = keys("""
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id tokenizer_class
    prefix
""")
_TYPES = keys("torch_dtype dtype use_bfloat16")
_OUTPUTS = keys("""
    use_cache return_dict output_attentions output_hidden_states output_past torchscript tf_legacy_loss is_decoder tie_encoder_decoder
    chunk_size_feed_forward
""")
_ORIGIN = keys("""
    _name_or_path name_or_path _commit_hash transformers_version transformers.js_config unsloth_version unsloth_fixed
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation _flash_attn_2_enabled
""")
# Of experts: losses and noise of the training, and layers after the last that guess more than one token.
_EXPERTS = keys("""
    output_router_logits router_aux_loss_coef router_jitter_noise aux_loss_alpha seq_aux num_nextn_predict_layers num_mtp_layers
""")
HARMLESS = _EXPERTS | _TRAINING | _GENERATION | _TOKENS | _TYPES | _OUTPUTS | _ORIGIN

# Keys of any family that change the result unless they have one of these values.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
}
