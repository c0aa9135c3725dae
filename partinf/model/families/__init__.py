"""The families of published models that are read, one declaration each: the keys of their `config.json` and the names of their tensors.

`hf_config` reads and writes configurations by a declaration, `checkpoint.hf_names` finds tensors by it, and nothing else in the library
knows a family's name: whatever a family changes in the computation is a field of `ModelConfig`. A declaration stands with its nearest
relatives: `llama`, `gpt` and `opt` for what came before it, `neox`, `gemma`, `olmo`, `cohere`; `fused` and `layer_norm` are Llama's layer
with one change, by several makers.
"""

from __future__ import annotations

from collections.abc import Mapping

from partinf.foundation.errors import InvalidInput, nearest
from partinf.model.config import ModelConfig
from partinf.model.families import cohere, fused, gemma, gpt, layer_norm, llama, mixtures, neox, olmo, opt
from partinf.model.families.harmless import HARMLESS as HARMLESS
from partinf.model.families.harmless import ONLY as ONLY
from partinf.model.families.harmless import keys
from partinf.model.family import Family, Wrapper

_DECLARED = (llama, gpt, opt, neox, gemma, olmo, cohere, fused, layer_norm, mixtures)
FAMILIES: Mapping[str, Family] = {family.model_type: family for module in _DECLARED for family in module.FAMILIES}


_IMAGES = keys("""
    vision_config image_token_index image_token_id boi_token_index eoi_token_index mm_tokens_per_image multimodal_projector_bias
    projector_hidden_act spatial_merge_size vision_feature_layer eos_token_id
""")
WRAPPERS: Mapping[str, Wrapper] = {
    one.model_type: one
    for one in (
        Wrapper("Gemma3ForConditionalGeneration", "gemma3", "text_config", "gemma3_text", "images", _IMAGES),
        Wrapper("Mistral3ForConditionalGeneration", "mistral3", "text_config", "mistral", "images", _IMAGES),
    )
}

_ALIBI = "its scores have a bias that grows with the distance (ALiBi), and positions are learned or rotated here"
_RECURRENT = "its layers carry a recurrent state, and a cache of keys and values is all that is kept here"
_EXPERTS = "its experts are none that are computed here"
_LATENT = "its keys and values are made of a latent"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(keys("bloom mpt"), _ALIBI),
    **dict.fromkeys(
        keys("""
            mamba mamba2 falcon_mamba rwkv xlstm recurrent_gemma jamba bamba zamba zamba2 falcon_h1 granitemoehybrid nemotron_h
            lfm2 lfm2_moe lfm3 qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text kimi_linear olmo_hybrid bailing_hybrid minimax
        """),
        _RECURRENT,
    ),
    **dict.fromkeys(
        keys("""
            dbrx arctic cohere2_moe nemotron_h_moe bailing_moe
        """),
        _EXPERTS,
    ),
    **dict.fromkeys(keys("deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 minicpm3 youtu longcat_flash glm4_moe_lite"), _LATENT),
    "phimoe": "its router chooses one expert after the other, each by a softmax over those that are nearly as good",
    "jetmoe": "its attention is a mixture of experts too",
    "afmoe": "its attention is multiplied by a gate",
    "laguna": "its attention is multiplied by a gate",
    **dict.fromkeys(keys("llama4 llama4_text"), "its attention sees chunks of positions, and its router weights what experts read"),
    "mimo_v2_flash": "its values have another size than its keys, and its layers differ in heads",
    "bitnet": "its weights have three values each, and its sublayers norms within",
    "apertus": "its activation (xIELU) has learned numbers",
    "nanochat": "it normalises embeddings before the first layer, and rotates the other way round",
    "gpt_neox_japanese": "its last layer alone has a bias",
    "gemma3n": "its layers share caches and take inputs of their own",
    "gemma4": "its layers share caches, have heads of two sizes and take inputs of their own",
    "gemma4_text": "its layers share caches, have heads of two sizes and take inputs of their own",
    "diffllama": "its attention is the difference of two",
    "doge": "its attention depends on learned masks",
    "ctrl": "its positions are sines that are added",
    "xglm": "its positions are sines that are added",
    "modernbert-decoder": "its blocks are none that is computed here",
}
"""Model types that are known and not read, and why in words."""


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
