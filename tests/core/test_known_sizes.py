"""Shipped models have the numbers of parameters that were published."""

from __future__ import annotations

import pytest

from partinf.model.families import family_offences
from partinf.model.load import load_model_config
from partinf.model.weights import active_params, num_params

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
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-nemo": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "phi-4": 14_659_507_200,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen-3-30b-a3b": 30_532_122_624,
    "qwen-3-235b-a22b": 235_093_634_560,
    "gpt-oss-20b": 20.91e9,  # section 2 of the model card, as are those of 120b
    "gpt-oss-120b": 116.83e9,
    # Less the layer that guesses more tokens, which has copies of both tables.
    "glm-4.5": 358_337_791_296 - 5_539_962_272,
    "glm-4.5-air": 110_468_824_832 - 3_616_573_568,
}
# Parameters that a token meets, as they were published, tables that are not counted, and how exactly they were published.
ACTIVE = {
    "mixtral-8x7b": (12.9e9, 0, 5e-3),
    "mixtral-8x22b": (39e9, 0, 1e-2),
    "qwen-3-30b-a3b": (3.3e9, 0, 2e-2),
    "qwen-3-235b-a22b": (22e9, 0, 2e-2),
    "gpt-oss-20b": (3.61e9, 1, 1e-3),
    "gpt-oss-120b": (5.13e9, 1, 1e-3),
    "glm-4.5": (32e9, 2, 2e-2),
    "glm-4.5-air": (12e9, 2, 2e-2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    model = load_model_config(name)
    assert num_params(model) == pytest.approx(PUBLISHED[name], rel=1e-3)
    assert family_offences(model) == []


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_those_published(name: str) -> None:
    published, tables, digits = ACTIVE[name]
    model = load_model_config(name)
    assert active_params(model) - tables * model.vocab_size * model.embed_dim == pytest.approx(published, rel=digits)


def test_five_layers_of_gemma_3_in_six_have_a_window() -> None:
    model = load_model_config("gemma-3-27b")
    windows = [model.layer_kinds[number].attention.window for number in model.kind_of_layers]
    assert windows == [0 if layer % 6 == 5 else 1024 for layer in range(62)]
    assert [kind.attention.rotation.theta for kind in model.layer_kinds if kind.attention.rotation] == [1e4, 1e6]
