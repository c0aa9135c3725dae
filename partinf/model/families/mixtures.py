"""Mixtures of experts: the attention of an older family, with experts in the place of its feed-forwards."""

from __future__ import annotations

from dataclasses import replace

from partinf.model.config import Activation
from partinf.model.families.harmless import keys
from partinf.model.families.llama import ATTENTION, GRANITE, HUNYUAN, LLAMA, QKV, QWEN3
from partinf.model.families.olmo import OLMO2
from partinf.model.families.shared import LLAMA_LAYER, NEIGHBOURS, QK_WIDTH, llama_naming, sizes, without
from partinf.model.family import Bias, Pick, Stored, Window
from partinf.model.hf_experts import Mixture
from partinf.model.hf_rope import Rope
from partinf.model.kinds import QkNorm, Router, Score

_MLP = "mlp."
_EXPERTS = {
    "router": Stored("X E", ("mlp.gate.weight",)),
    "wx_in": Stored("W E", ("mlp.experts.{number}.gate_proj.weight", "mlp.experts.{number}.up_proj.weight"), numbered="X"),
    "wx_out": Stored("E W", ("mlp.experts.{number}.down_proj.weight",), numbered="X"),
}
_BLOCK_SPARSE = {
    "router": Stored("X E", ("block_sparse_moe.gate.weight",)),
    "router_correction": Stored("X", ("block_sparse_moe.e_score_correction_bias",)),
    "wx_in": Stored("W E", ("block_sparse_moe.experts.{number}.w1.weight", "block_sparse_moe.experts.{number}.w3.weight"), numbered="X"),
    "wx_out": Stored("E W", ("block_sparse_moe.experts.{number}.w2.weight",), numbered="X"),
}


def _shared(within: str) -> dict[str, Stored]:
    """The feed-forward next to the experts, by what stands before its matrices."""
    return {
        name: replace(LLAMA_LAYER[name], tensors=tuple(tensor.replace(_MLP, f"{within}.", 1) for tensor in LLAMA_LAYER[name].tensors))
        for name in ("w_in", "w_out")
    }


_ALL_MIXED = without(sizes(), "ffn_dim")  # of families whose layers all have experts, and one width
_MIXTRAL = replace(
    LLAMA,
    title="Mixtral",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    sizes=without(sizes({"num_kv_heads": 8, "max_len": 4096 * 32}), "ffn_dim"),
    norm_eps=("rms_norm_eps", 1e-5),
    naming=llama_naming(mixed_weights=_BLOCK_SPARSE),
    only={},
    biases=(),
    window=Window(None),
    mixture=Mixture((("num_local_experts", "num_experts"), 8), ("num_experts_per_tok", 2), ("intermediate_size", 14336)),
    rope=Rope(theta=1e6),
)
_QWEN_MIXTURE = Mixture(
    count=(("num_experts", "num_local_experts"), 128),
    per_token=("num_experts_per_tok", 8),
    width=("moe_intermediate_size", 768),
    renormalised=("norm_topk_prob", False),
    every=("decoder_sparse_step", 1),
    listed="mlp_only_layers",
)
_QWEN3_MOE = replace(
    QWEN3,
    title="Qwen 3 MoE",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    sizes=sizes({"num_kv_heads": 4, "max_len": 32768}),
    naming=llama_naming(mixed_weights=_EXPERTS),
    window=Window(4096, flag="use_sliding_window"),
    mixture=_QWEN_MIXTURE,
    harmless=keys("max_window_layers"),
)
_QWEN2_MOE = replace(
    LLAMA,
    title="Qwen 2 MoE",
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    sizes=without(sizes({"num_kv_heads": 16, "max_len": 32768}), "head_dim"),
    naming=llama_naming(
        mixed_weights=_EXPERTS | _shared("mlp.shared_expert") | {"shared_gate": Stored("1 E", ("mlp.shared_expert_gate.weight",), leaf="E")}
    ),
    only={"use_sliding_window": (False,)},
    biases=(Bias("qkv_bias", True, QKV),),
    mixture=replace(
        _QWEN_MIXTURE,
        count=(("num_experts",), 60),
        per_token=("num_experts_per_tok", 4),
        width=("moe_intermediate_size", 1408),
        shared=("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    ),
    harmless=keys("sliding_window max_window_layers"),
)
_OLMOE = replace(
    LLAMA,
    title="OLMoE",
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    sizes=without(sizes({"max_len": 4096}), "ffn_dim", "head_dim"),
    norm_eps=("rms_norm_eps", 1e-5),
    naming=llama_naming(QK_WIDTH, mixed_weights=_EXPERTS),
    only={"clip_qkv": (None,)},  # it cuts off what is normalised already
    block={"qk_norm": QkNorm.WIDTH},
    biases=(Bias("attention_bias", False, ATTENTION),),
    mixture=Mixture(
        (("num_experts", "num_local_experts"), 64),
        ("num_experts_per_tok", 8),
        ("intermediate_size", 2048),
        renormalised=("norm_topk_prob", False),
    ),
)
_FLEX_OLMO = replace(
    OLMO2,
    title="FlexOLMo",
    architecture="FlexOlmoForCausalLM",
    model_type="flex_olmo",
    sizes=without(sizes({"max_len": 4096}), "ffn_dim", "head_dim"),
    norm_eps=("rms_norm_eps", 1e-6),
    naming=replace(OLMO2.naming, mixed_weights=_EXPERTS),  # type: ignore[type-var]
    mixture=replace(
        _OLMOE.mixture,  # type: ignore[type-var]
        count=(("num_experts", "num_local_experts"), 7),
        per_token=("num_experts_per_tok", 5),
        width=("intermediate_size", 11008),
    ),
    rope=Rope(theta=5e5),
)
_OF_CHOSEN = Router(Score.SOFTMAX_OF_CHOSEN)
_GPT_OSS_BIASES = {
    "router_bias": Stored("X", ("mlp.router.bias",)),
    "bx_in": Stored("X W2", ("mlp.experts.gate_up_proj_bias",), leaf="X2W"),
    "bx_out": Stored("X E", ("mlp.experts.down_proj_bias",)),
}
_GPT_OSS = replace(
    LLAMA,
    title="gpt-oss",
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    sizes=without(sizes({"num_kv_heads": 8, "head_dim": 64, "max_len": 131072}), "ffn_dim"),
    norm_eps=("rms_norm_eps", 1e-5),
    naming=llama_naming(
        {"sinks": Stored("H", ("self_attn.sinks",))},
        mixed_weights={
            "router": Stored("X E", ("mlp.router.weight",)),
            "wx_in": Stored("X E W2", ("mlp.experts.gate_up_proj",), leaf="X2WE"),
            "wx_out": Stored("X W E", ("mlp.experts.down_proj",), leaf="XEW"),
            **_GPT_OSS_BIASES,
        },
        packed_weights={
            "wx_in": Stored("X W2 E", ("mlp.experts.gate_up_proj",), leaf="X2WE", packed=True),
            "wx_out": Stored("X E W", ("mlp.experts.down_proj",), packed=True),
        },
    ),
    only={"hidden_act": ("silu",), "swiglu_alpha": (1.702,)},
    block={"sinks": True},
    picks=(),
    biases=(Bias("attention_bias", True, ATTENTION),),
    window=Window(128, typed=True, every=("", 2)),
    mixture=Mixture(
        (("num_local_experts", "num_experts"), 128),
        ("num_experts_per_tok", 4),
        ("intermediate_size", 2880),
        each={"activation": Activation.GELU_SIGMOID, "biases": ("w_in", "w_out"), "up_offset": 1.0},
        clamp=("swiglu_limit", 7.0),
        router=replace(_OF_CHOSEN, bias=True),
    ),
    quantised=("mxfp4",),
    rope=Rope(
        theta=150000.0,
        missing={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    harmless=keys("experts_per_token initial_context_length"),  # older names of what stands there too
)
_CORRECTED = Router(Score.SIGMOID, correction=True)
_GLM_EXPERTS = _EXPERTS | _shared("mlp.shared_experts") | {"router_correction": Stored("X", ("mlp.gate.e_score_correction_bias",))}
_GLM_MIXTURE = Mixture(
    (("n_routed_experts", "num_local_experts"), 128),
    ("num_experts_per_tok", 8),
    ("moe_intermediate_size", 1408),
    router=_CORRECTED,
    renormalised=("norm_topk_prob", True),
    scale=("routed_scaling_factor", 1.0),
    groups=("n_group", 1),
    chosen_groups=("topk_group", 1),
    shared=("n_shared_experts", 1),
    shared_experts=True,
    first=("first_k_dense_replace", 1),
)
_AFTER_THE_LAST = ("model.layers.{layers}.",)  # guesses more than one token
_GLM4_MOE = replace(
    LLAMA,
    title="GLM-4.5",
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    sizes=sizes({"num_kv_heads": 8, "max_len": 131072}),
    norm_eps=("rms_norm_eps", 1e-5),
    naming=llama_naming(mixed_weights=_GLM_EXPERTS, aside=_AFTER_THE_LAST),
    only={},
    picks=(*LLAMA.picks, Pick("use_qk_norm", False, ((False, {"qk_norm": QkNorm.NONE}), (True, {"qk_norm": QkNorm.HEAD})))),
    biases=(Bias("attention_bias", False, QKV),),
    mixture=_GLM_MIXTURE,
    rope=Rope(partial=0.5),
)
_SOLAR_OPEN = replace(
    _GLM4_MOE,
    title="Solar Open",
    architecture="SolarOpenForCausalLM",
    model_type="solar_open",
    sizes=without(sizes({"num_kv_heads": 8, "head_dim": 128, "max_len": 131072}), "ffn_dim"),
    picks=LLAMA.picks,
    mixture=replace(_GLM_MIXTURE, width=("moe_intermediate_size", 1280), first=("", 0)),
    rope=Rope(theta=1e6, partial=1.0),
    harmless=keys("intermediate_size first_k_dense_replace use_qk_norm"),
)
_DOTS1 = replace(
    _GLM4_MOE,
    title="dots.llm1",
    architecture="Dots1ForCausalLM",
    model_type="dots1",
    sizes=sizes({"num_kv_heads": 32, "max_len": 2048}),
    norm_eps=("rms_norm_eps", 1e-6),
    block={"qk_norm": QkNorm.HEAD},
    picks=LLAMA.picks,
    biases=(Bias("attention_bias", False, ATTENTION),),
    window=Window(4096, typed=True, first=("max_window_layers", 62)),
    mixture=replace(
        _GLM_MIXTURE,
        count=(("n_routed_experts", "num_local_experts"), None),
        per_token=("num_experts_per_tok", None),
        renormalised=("norm_topk_prob", False),
        shared=("n_shared_experts", None),
        first=("first_k_dense_replace", 0),
    ),
    rope=Rope(),
)
_EXAONE_MOE = replace(
    _GLM4_MOE,
    title="EXAONE MoE",
    architecture="ExaoneMoeForCausalLM",
    model_type="exaone_moe",
    sizes=sizes({"num_kv_heads": 32, "max_len": 2048}),
    naming=llama_naming(
        mixed_weights=_GLM_EXPERTS | {"router_correction": Stored("X", ("mlp.e_score_correction_bias",))}, aside=("mtp.", *_AFTER_THE_LAST)
    ),
    block={"qk_norm": QkNorm.HEAD},
    picks=LLAMA.picks,
    biases=(),
    window=Window(4096, typed=True, every=("sliding_window_pattern", 4), unrotated=True),
    mixture=replace(
        _GLM_MIXTURE,
        count=(("num_experts", "num_local_experts"), 64),
        width=("moe_intermediate_size", 1024),
        scale=("routed_scaling_factor", 2.5),
        shared=("num_shared_experts", 1),
        typed="mlp_layer_types",
    ),
    rope=Rope(),
)
_MINIMAX_M2 = replace(
    LLAMA,
    title="MiniMax-M2",
    architecture="MiniMaxM2ForCausalLM",
    model_type="minimax_m2",
    sizes=without(sizes({"num_kv_heads": 8, "head_dim": 128, "max_len": 196608}), "ffn_dim"),
    naming=llama_naming(QK_WIDTH, mixed_weights=_BLOCK_SPARSE, aside=_AFTER_THE_LAST),
    only={
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "use_routing_bias": (True,),
        "scoring_func": ("sigmoid",),
        "shared_intermediate_size": (0,),
    },
    block={"qk_norm": QkNorm.WIDTH},
    biases=(),
    mixture=Mixture(
        (("num_local_experts", "num_experts"), 256), ("num_experts_per_tok", 8), ("intermediate_size", 1536), router=_CORRECTED
    ),
    rope=Rope(theta=5e6, partial=1.0, optional_dims_key="rotary_dim"),
    harmless=keys("use_mtp mtp_transformer_layers num_mtp_modules attn_type_list shared_moe_mode"),
)
_GRANITE_EXPERTS = {
    "router": Stored("X E", ("block_sparse_moe.router.layer.weight",)),
    "wx_in": Stored("X 2W E", ("block_sparse_moe.input_linear.weight",)),
    "wx_out": Stored("X E W", ("block_sparse_moe.output_linear.weight",)),
    "w_in": Stored("F E", ("shared_mlp.input_linear.weight",) * 2, fused=("F", "F"), part=(0, 1)),
    "w_out": Stored("E F", ("shared_mlp.output_linear.weight",)),
}
_GRANITE_MOE = replace(
    GRANITE,
    title="Granite MoE",
    architecture="GraniteMoeForCausalLM",
    model_type="granitemoe",
    sizes=without(sizes({"max_len": 2048}), "ffn_dim", "head_dim"),
    naming=llama_naming(mixed_weights=_GRANITE_EXPERTS),
    biases=(Bias("attention_bias", False, ATTENTION),),
    mixture=Mixture((("num_local_experts",), 8), ("num_experts_per_tok", 2), ("intermediate_size", 11008), router=_OF_CHOSEN),
)
_GRANITE_MOE_SHARED = replace(
    _GRANITE_MOE,
    title="Granite MoE shared",
    architecture="GraniteMoeSharedForCausalLM",
    model_type="granitemoeshared",
    mixture=replace(_GRANITE_MOE.mixture, shared=("shared_intermediate_size", 0)),  # type: ignore[type-var]
)
_ERNIE_MOE = replace(
    LLAMA,
    title="ERNIE 4.5 MoE",
    architecture="Ernie4_5_MoeForCausalLM",
    model_type="ernie4_5_moe",
    sizes=without(sizes({"num_kv_heads": 4, "max_len": 131072}), "head_dim"),
    norm_eps=("rms_norm_eps", 1e-5),
    tied=True,
    naming=llama_naming(
        mixed_weights=_GLM_EXPERTS | {"router_correction": Stored("1 X", ("mlp.moe_statics.e_score_correction_bias",), leaf="X")},
        neighbours=NEIGHBOURS,
        aside=("model.mtp_",),
    ),
    only={"use_bias": (False,), "moe_norm_min": (1e-12,)},
    biases=(),
    mixture=Mixture(
        (("moe_num_experts", "num_experts"), 64),
        ("moe_k", 6),
        ("moe_intermediate_size", 1536),
        router=Router(correction=True),
        shared=("moe_num_shared_experts", 2),
        shared_experts=True,
        first=("moe_layer_start_index", 1),
        last=("moe_layer_end_index", -1),
        every=("moe_layer_interval", 1),
    ),
    rope=Rope(theta=5e5),
)
_HUNYUAN_MOE = replace(
    HUNYUAN,
    title="Hunyuan MoE",
    architecture="HunYuanMoEV1ForCausalLM",
    model_type="hunyuan_v1_moe",
    sizes=without(sizes({"max_len": 2048}), "ffn_dim"),
    naming=replace(
        HUNYUAN.naming,  # type: ignore[type-var]
        mixed_weights=_EXPERTS | _shared("mlp.shared_mlp") | {"router": Stored("X E", ("mlp.gate.wg.weight",))},
    ),
    only={"num_shared_expert": (1,), "use_mixed_mlp_moe": (True,)},
    mixture=Mixture(
        (("num_experts", "num_local_experts"), 1), ("moe_topk", 1), ("intermediate_size", 11008), shared=("", 1), shared_experts=True
    ),
)

FAMILIES = (
    *(_MIXTRAL, _QWEN2_MOE, _QWEN3_MOE, _OLMOE, _FLEX_OLMO, _GPT_OSS, _GLM4_MOE, _SOLAR_OPEN, _DOTS1, _EXAONE_MOE),
    *(_MINIMAX_M2, _GRANITE_MOE, _GRANITE_MOE_SHARED, _ERNIE_MOE, _HUNYUAN_MOE),
)
