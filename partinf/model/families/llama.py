"""Llama and its nearest: RMS norms before gated sublayers, rotary positions, names of tensors as Llama has them."""

from __future__ import annotations

from dataclasses import replace

from partinf.model.config import Norm
from partinf.model.families.harmless import keys
from partinf.model.families.shared import ALL_BIASES, LLAMA_LAYER, NEIGHBOURS, UNGATED, activation, llama_naming, sizes, without
from partinf.model.family import Bias, Family, Pick, Scalar, Size, Window
from partinf.model.hf_rope import Rope
from partinf.model.kinds import NormPlaces, QkNorm

_IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
WRAPPED = {
    "bases": ("model.", "language_model.model.", "model.language_model.", ""),
    "heads": {"language_model.model.": "language_model."},
    "aside": _IMAGES,
}
"""The names of a model of text that stands in one that reads images too, as transformers 4 and 5 write them."""

QKV, ATTENTION, FEED_FORWARD = ("wq", "wkv"), ("wq", "wkv", "wo"), ("w_in", "w_out")
_LLAMA_BIASES = (Bias("attention_bias", False, ATTENTION), Bias("mlp_bias", False, FEED_FORWARD))
LLAMA = Family(
    title="Llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    sizes=sizes({"max_len": 2048}),
    norm_eps=("rms_norm_eps", 1e-6),
    tied=False,
    naming=llama_naming(),
    only={"rope_interleaved": (False,)},
    picks=(activation("hidden_act", "silu"),),
    biases=_LLAMA_BIASES,
    harmless=keys("pretraining_tp max_sequence_length is_llama_config"),  # the first cuts products into parts that are added again
)
_MISTRAL = replace(
    LLAMA,
    title="Mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    sizes=sizes({"num_kv_heads": 8, "max_len": 4096 * 32}),
    naming=llama_naming(**WRAPPED),
    only={"rope_interleaved": (False,), "attention_bias": (False,), "mlp_bias": (False,)},
    biases=(),
    window=Window(absent=4096),
)
_MINISTRAL = replace(
    _MISTRAL, title="Ministral", architecture="MinistralForCausalLM", model_type="ministral", window=Window(4096, typed=True)
)
_GROWING = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0}
_GROWING |= {"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
_MINISTRAL3 = replace(
    _MISTRAL,
    title="Ministral 3",
    architecture="Ministral3ForCausalLM",
    model_type="ministral3",
    sizes=sizes({"num_kv_heads": 8, "head_dim": 128, "max_len": 262144}),
    norm_eps=("rms_norm_eps", 1e-5),
    window=Window(absent=None),
    rope=Rope(missing=_GROWING, growth_key="llama_4_scaling_beta"),
)
_LLAMA3 = {"rope_type": "llama3", "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
_CWM = replace(
    LLAMA,
    title="CWM",
    architecture="CwmForCausalLM",
    model_type="cwm",
    sizes=sizes({"num_kv_heads": 8, "head_dim": 128, "max_len": 131072}),
    norm_eps=("rms_norm_eps", 1e-5),
    only={"attention_bias": (False,)},
    biases=(Bias("mlp_bias", False, FEED_FORWARD),),
    window=Window(8192, typed=True, every=("", 4), full_first=True),
    rope=Rope(theta=1e6, missing=_LLAMA3),
)
_QWEN_WINDOW = Window(absent=4096, flag="use_sliding_window", typed=True, first=("max_window_layers", 28))
_QWEN2 = replace(
    LLAMA,
    title="Qwen 2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    sizes=without(sizes({"num_kv_heads": 32, "max_len": 32768}), "head_dim"),
    only={},
    block={"biases": QKV},
    biases=(),
    window=_QWEN_WINDOW,
    harmless=keys("use_mrope mrope_section"),
)
QWEN3 = replace(
    LLAMA,
    title="Qwen 3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    # The defaults of these two are no function of the others.
    sizes=sizes({"max_len": 32768}) | {"num_kv_heads": Size("num_key_value_heads"), "head_dim": Size("head_dim")},
    block={"qk_norm": QkNorm.HEAD},
    biases=(Bias("attention_bias", False, ATTENTION),),
    window=_QWEN_WINDOW,
)
_SMOLLM3 = replace(
    LLAMA,
    title="SmolLM3",
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    sizes=sizes({"num_kv_heads": 4, "max_len": 32768}),
    tied=True,
    window=Window(None, flag="use_sliding_window", typed=True, unrotated_keys=("no_rope_layers", "no_rope_layer_interval", 4)),
    rope=Rope(theta=2e6),
    harmless=keys("max_window_layers pretraining_tp"),
)
_MULTIPLIERS = (
    Scalar("embedding_multiplier", "embedding_scale", 1.0),
    Scalar("residual_multiplier", "residual_scale", 1.0),
    Scalar("logits_scaling", "logit_scale", 1.0, lambda scaling: 1 / scaling, lambda scale: 1 / scale),
)
GRANITE = replace(
    LLAMA,
    title="Granite",
    architecture="GraniteForCausalLM",
    model_type="granite",
    scalars=(*_MULTIPLIERS, Scalar("attention_multiplier", "attention_scale", 1.0)),
)
_POST_NORMS = {"attention_post_norm": replace(LLAMA_LAYER["attention_norm"], tensors=("post_norm1.weight",))}
_POST_NORMS |= {"ffn_post_norm": replace(LLAMA_LAYER["ffn_norm"], tensors=("post_norm2.weight",))}
_HYPERCLOVAX = replace(
    LLAMA,
    title="HyperCLOVA X",
    architecture="HyperCLOVAXForCausalLM",
    model_type="hyperclovax",
    naming=llama_naming(_POST_NORMS),
    picks=(*LLAMA.picks, Pick("use_post_norm", True, ((True, {"norms": NormPlaces.BOTH}), (False, {"norms": NormPlaces.BEFORE})))),
    # Without the key scores are divided by the root of the size of a head, as usual.
    scalars=(*_MULTIPLIERS[:2], Scalar("logits_scaling", "logit_scale", 1.0), Scalar("attention_multiplier", "attention_scale", None)),
)
_SEED_OSS = replace(
    LLAMA,
    title="Seed-OSS",
    architecture="SeedOssForCausalLM",
    model_type="seed_oss",
    sizes=sizes({"num_kv_heads": 8, "head_dim": 128, "max_len": 524288}),
    biases=(Bias("attention_bias", True, QKV), Bias("attention_out_bias", False, ("wo",)), Bias("mlp_bias", False, FEED_FORWARD)),
    harmless=keys("pretraining_tp residual_dropout"),
)
_ARCEE = replace(
    LLAMA,
    title="Arcee",
    architecture="ArceeForCausalLM",
    model_type="arcee",
    sizes=sizes({"max_len": 4096}),
    norm_eps=("rms_norm_eps", 1e-5),
    naming=llama_naming(UNGATED),
    block={"gated": False},
    picks=(activation("hidden_act", "relu2"),),
)
_JAIS2 = replace(
    _ARCEE,
    title="Jais 2",
    architecture="Jais2ForCausalLM",
    model_type="jais2",
    sizes=sizes({"max_len": 8192}),
    norm_eps=("layer_norm_eps", 1e-5),
    block={"gated": False, "norm": Norm.LAYER},
    biases=(Bias("attention_bias", True, ATTENTION), Bias("mlp_bias", True, FEED_FORWARD)),
)
HUNYUAN = replace(
    LLAMA,
    title="Hunyuan dense",
    architecture="HunYuanDenseV1ForCausalLM",
    model_type="hunyuan_v1_dense",
    norm_eps=("rms_norm_eps", 1e-5),
    naming=llama_naming(
        {
            "q_norm": replace(LLAMA_LAYER["q_norm"], tensors=("self_attn.query_layernorm.weight",)),
            "k_norm": replace(LLAMA_LAYER["k_norm"], tensors=("self_attn.key_layernorm.weight",)),
        }
    ),
    block={"qk_norm": QkNorm.HEAD, "qk_norm_rotated": True},
    biases=(Bias("attention_bias", False, ATTENTION),),
    harmless=keys("pretraining_tp eod_token_id im_end_id im_newline_id im_start_id use_cla cla_share_factor"),
    rope=Rope(alpha=True),
)
_HELIUM = replace(
    LLAMA,
    title="Helium",
    architecture="HeliumForCausalLM",
    model_type="helium",
    sizes=sizes({"num_kv_heads": 20, "head_dim": 128, "max_len": 4096}),
    norm_eps=("rms_norm_eps", 1e-8),
    naming=llama_naming(neighbours=NEIGHBOURS),
    only={},
    rope=Rope(theta=1e5),
    biases=(Bias("attention_bias", False, QKV), Bias("mlp_bias", False, FEED_FORWARD)),
)
_ERNIE = replace(
    LLAMA,
    title="ERNIE 4.5",
    architecture="Ernie4_5ForCausalLM",
    model_type="ernie4_5",
    sizes=sizes({"num_kv_heads": 2, "head_dim": 128, "max_len": 131072}),
    norm_eps=("rms_norm_eps", 1e-5),
    tied=True,
    naming=llama_naming(neighbours=NEIGHBOURS),
    only={},
    rope=Rope(theta=5e5),
    biases=(Bias("use_bias", False, ALL_BIASES),),
)

FAMILIES = (
    *(LLAMA, _MISTRAL, _MINISTRAL, _MINISTRAL3, _QWEN2, QWEN3, _CWM, _SMOLLM3, GRANITE, _HYPERCLOVAX),
    *(_SEED_OSS, _ARCEE, _JAIS2, HUNYUAN, _HELIUM, _ERNIE),
)
