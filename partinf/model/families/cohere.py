"""Cohere: one LayerNorm without a bias, which both sublayers of a layer read, and logits that are scaled."""

from __future__ import annotations

from dataclasses import replace

from partinf.model.config import Block, Norm
from partinf.model.families.harmless import keys
from partinf.model.families.llama import ATTENTION, LLAMA
from partinf.model.families.shared import NEIGHBOURS, QK_HEADS, heads_norm, llama_naming, sizes
from partinf.model.family import Bias, Scalar, Window
from partinf.model.hf_rope import Rope

_COHERE = replace(
    LLAMA,
    title="Cohere",
    architecture="CohereForCausalLM",
    model_type="cohere",
    sizes=sizes({"max_len": 8192}),
    norm_eps=("layer_norm_eps", 1e-5),
    tied=True,
    naming=llama_naming(QK_HEADS, neighbours=NEIGHBOURS | {"q_norm", "k_norm"}),
    only={},
    picks=(*LLAMA.picks, heads_norm("use_qk_norm")),
    block={"block": Block.PARALLEL, "norm": Norm.LAYER_NO_BIAS},
    scalars=(Scalar("logit_scale", "logit_scale", 0.0625),),
    biases=(Bias("attention_bias", False, ATTENTION),),
    rope=Rope(theta=5e5),
)
_COHERE2 = replace(
    _COHERE,
    title="Cohere 2",
    architecture="Cohere2ForCausalLM",
    model_type="cohere2",
    picks=LLAMA.picks,
    only={
        "use_qk_norm": (False,),
        "position_embedding_type": ("rope_gptj",),
        "use_embedding_sharing": (True,),
        "use_parallel_block": (True,),
    },
    equal=(("head_dim", "head_dim"),),
    window=Window(4096, typed=True, every=("sliding_window_pattern", 4), unrotated=True),
    rope=Rope(),
    harmless=keys("cache_implementation use_parallel_embedding use_gated_activation order_of_interleaved_layers rotary_pct layer_switch"),
)

FAMILIES = (_COHERE, _COHERE2)
