"""Gemma: norms that multiply by 1 + weight, embeddings scaled by the root of their width, GELU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from partinf.model.config import Activation, Norm
from partinf.model.families.llama import ATTENTION, LLAMA, WRAPPED
from partinf.model.families.shared import AFTER, activation, llama_naming, sizes
from partinf.model.family import Bias, Scalar, Window
from partinf.model.hf_rope import Rope
from partinf.model.kinds import NormPlaces, QkNorm


def _root_of_width(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"embedding_scale": math.sqrt(fields["embed_dim"])}


def _root(scalar: float) -> float:
    return abs(scalar) ** -0.5


def _scalar(root: float) -> float:
    """A whole number where it nearly is one: transformers wants an int then."""
    exact = root**-2
    return round(exact) if abs(exact - round(exact)) < 1e-6 else exact


_SIZES = {"num_kv_heads": 4, "head_dim": 256, "max_len": 8192}
_BIASES = (Bias("attention_bias", False, ATTENTION),)
_FORWARD = {"use_bidirectional_attention": (False,)}
_GEMMA = replace(
    LLAMA,
    title="Gemma",
    architecture="GemmaForCausalLM",
    model_type="gemma",
    sizes=sizes(_SIZES | {"num_kv_heads": 16}),
    tied=True,
    only=_FORWARD | {"hidden_activation": (None, "gelu_pytorch_tanh")},
    block={"norm": Norm.RMS_1P},
    picks=(activation("hidden_act", "gelu_pytorch_tanh", gelu=Activation.GELU_TANH),),  # the first files called it so
    biases=_BIASES,
    derived=_root_of_width,
)
_CAPPED = (
    Scalar("query_pre_attn_scalar", "attention_scale", 256.0, _root, _scalar),
    Scalar("attn_logit_softcapping", "attention_cap", 50.0),
    Scalar("final_logit_softcapping", "logit_cap", 30.0),
)
_GEMMA2 = replace(
    _GEMMA,
    title="Gemma 2",
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    sizes=sizes(_SIZES),
    naming=llama_naming(AFTER),
    only=_FORWARD | {"hidden_act": (None, "gelu_pytorch_tanh")},
    block={"norm": Norm.RMS_1P, "norms": NormPlaces.BOTH},
    picks=(activation("hidden_activation", "gelu_pytorch_tanh"),),
    scalars=_CAPPED,
    window=Window(4096, typed=True, every=("", 2)),
)
_VAULTGEMMA = replace(
    _GEMMA2,
    title="VaultGemma",
    architecture="VaultGemmaForCausalLM",
    model_type="vaultgemma",
    naming=llama_naming({"ffn_norm": AFTER["ffn_norm"]}),
    block={"norm": Norm.RMS_1P},
)
_GEMMA3_DEFAULTS = _SIZES | {"num_layers": 26, "embed_dim": 2304, "ffn_dim": 9216, "num_heads": 8, "vocab_size": 262208, "max_len": 131072}
_GEMMA3 = replace(
    _GEMMA2,
    title="Gemma 3",
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    sizes=sizes(_GEMMA3_DEFAULTS),  # published files of models that read images too leave out what equals these
    naming=llama_naming(AFTER, **WRAPPED),
    block={"norm": Norm.RMS_1P, "norms": NormPlaces.BOTH, "qk_norm": QkNorm.HEAD},
    scalars=tuple(replace(scalar, absent=scalar.absent if scalar.key == "query_pre_attn_scalar" else None) for scalar in _CAPPED),
    window=Window(4096, typed=True, every=("sliding_window_pattern", 6)),
    rope=Rope(by_type={"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}, original=False),
    harmless=frozenset({"_sliding_window_pattern", "cache_implementation"}),
)

FAMILIES = (_GEMMA, _GEMMA2, _GEMMA3, _VAULTGEMMA)
