"""StableLM, Nemotron and StarCoder 2: Llama's layer, with LayerNorm for RMS norms."""

from __future__ import annotations

from dataclasses import replace

from partinf.model.config import Block, Norm
from partinf.model.families.harmless import keys
from partinf.model.families.llama import ATTENTION, FEED_FORWARD, LLAMA, QKV
from partinf.model.families.shared import ALL_BIASES, UNGATED, activation, heads_norm, llama_naming, sizes, without
from partinf.model.family import Bias, Pick, Stored, Window
from partinf.model.hf_rope import Rope

_STABLELM = replace(
    LLAMA,
    title="StableLM",
    architecture="StableLmForCausalLM",
    model_type="stablelm",
    sizes=without(sizes({"num_kv_heads": 32, "max_len": 4096}), "head_dim"),
    norm_eps=("layer_norm_eps", 1e-5),
    naming=llama_naming(
        {
            "q_norm": Stored("Q", ("self_attn.q_layernorm.norms.{number}.weight",), numbered="H"),
            "k_norm": Stored("Q", ("self_attn.k_layernorm.norms.{number}.weight",), numbered="K"),
        }
    ),
    only={},
    block={"norm": Norm.LAYER},
    picks=(
        *LLAMA.picks,
        heads_norm("qk_layernorm"),
        Pick("use_parallel_residual", False, ((False, {"block": Block.SERIAL}), (True, {"block": Block.PARALLEL}))),
    ),
    biases=(Bias("use_qkv_bias", False, QKV),),
    rope=Rope(partial=0.25),
    harmless=keys("rotary_scaling_factor"),
)
_NEMOTRON = replace(
    LLAMA,
    title="Nemotron",
    architecture="NemotronForCausalLM",
    model_type="nemotron",
    sizes=sizes({"max_len": 4096}),
    norm_eps=("norm_eps", 1e-5),
    naming=llama_naming(UNGATED),
    only={},
    block={"gated": False, "norm": Norm.LAYER_1P},
    picks=(activation("hidden_act", "relu2"),),
    biases=(Bias("attention_bias", False, ATTENTION), Bias("mlp_bias", False, FEED_FORWARD)),
    rope=Rope(partial=0.5),
)
_STARCODER2_FFN = {
    "w_in": Stored("1F E", ("mlp.c_fc.weight",)),
    "b_in": Stored("1F", ("mlp.c_fc.bias",)),
    "w_out": Stored("E F", ("mlp.c_proj.weight",)),
    "b_out": Stored("E", ("mlp.c_proj.bias",)),
}
_STARCODER2 = replace(
    LLAMA,
    title="StarCoder 2",
    architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    sizes=without(sizes({"num_kv_heads": 2, "max_len": 4096}), "head_dim"),
    norm_eps=("norm_epsilon", 1e-5),
    tied=True,
    naming=llama_naming(_STARCODER2_FFN),
    only={"mlp_type": ("default",), "norm_type": ("layer_norm",)},
    block={"gated": False, "norm": Norm.LAYER},
    picks=(activation("hidden_act", "gelu_pytorch_tanh"),),
    biases=(Bias("use_bias", True, ALL_BIASES),),
    window=Window(None),
    harmless=keys("residual_dropout embedding_dropout"),
)

FAMILIES = (_STABLELM, _NEMOTRON, _STARCODER2)
