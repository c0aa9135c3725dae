"""Shipped models have the numbers of parameters that were published."""

from __future__ import annotations

import pytest

from partinf.model.families import family_offences
from partinf.model.load import load_model_config
from partinf.model.weights import num_params

# As the indices of the published weights have them, and for Gemma 3 as table 1 of its report does, in millions, without what reads images.
PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "qwen-2.5-0.5b": 494_032_768,
    "qwen-2.5-1.5b": 1_543_714_304,
    "qwen-2.5-3b": 3_085_938_688,
    "qwen-2.5-7b": 7_615_616_512,
    "qwen-2.5-14b": 14_770_033_664,
    "qwen-2.5-32b": 32_763_876_352,
    "qwen-2.5-72b": 72_706_203_648,
    "gemma-3-1b": (302 + 698) * 10**6,
    "gemma-3-4b": (675 + 3209) * 10**6,
    "gemma-3-12b": (1012 + 10_759) * 10**6,
    "gemma-3-27b": (1416 + 25_600) * 10**6,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "phi-4": 14_659_507_200,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    model = load_model_config(name)
    assert num_params(model) == pytest.approx(PUBLISHED[name], rel=1e-3)
    assert family_offences(model) == []


def test_five_layers_of_gemma_3_in_six_have_a_window() -> None:
    model = load_model_config("gemma-3-27b")
    windows = [model.layer_kinds[number].attention.window for number in model.kind_of_layers]
    assert windows == [0 if layer % 6 == 5 else 1024 for layer in range(62)]
    assert [kind.attention.rotation.theta for kind in model.layer_kinds if kind.attention.rotation] == [1e4, 1e6]
