"""OLMo, which norms without weights and, from 2 on, what a sublayer adds; and EXAONE 4, which is built like it."""

from __future__ import annotations

from dataclasses import replace

from partinf.model.config import Norm
from partinf.model.families.llama import ATTENTION, LLAMA
from partinf.model.families.shared import AFTER, QK_WIDTH, llama_naming, sizes
from partinf.model.family import Bias, Scalar, Window
from partinf.model.hf_rope import Rope
from partinf.model.kinds import NormPlaces, QkNorm

_OLMO = replace(
    LLAMA,
    title="OLMo",
    architecture="OlmoForCausalLM",
    model_type="olmo",
    norm_eps=("", 1e-5),
    only={},
    block={"norm": Norm.LAYER_BARE},
    scalars=(Scalar("clip_qkv", "qkv_clip", None),),
    biases=(Bias("attention_bias", False, ATTENTION),),
)
OLMO2 = replace(
    _OLMO,
    title="OLMo 2",
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    norm_eps=("rms_norm_eps", 1e-5),
    naming=llama_naming(AFTER, QK_WIDTH),
    block={"norms": NormPlaces.AFTER, "qk_norm": QkNorm.WIDTH},
    scalars=(),
)
_OLMO3 = replace(
    OLMO2,
    title="OLMo 3",
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    window=Window(4096, typed=True, every=("", 4)),
    rope=Rope(by_type={"full_attention": ("rope_theta", 5e5), "sliding_attention": ("", 5e5)}, original=False),
)
_EXAONE4 = replace(
    OLMO2,
    title="EXAONE 4",
    architecture="Exaone4ForCausalLM",
    model_type="exaone4",
    sizes=sizes({"num_kv_heads": 32, "max_len": 2048}),
    naming=llama_naming(AFTER),
    block={"norms": NormPlaces.AFTER, "qk_norm": QkNorm.HEAD},
    biases=(),
    window=Window(4096, typed=True, every=("sliding_window_pattern", 4), unrotated=True),
)

FAMILIES = (_OLMO, OLMO2, _OLMO3, _EXAONE4)
