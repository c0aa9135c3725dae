"""Configuration keys: those of published files are read, and whatever could change the result without being computed is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from partinf.buckets import Capacity, with_capacity
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout.files import layout_from_toml
from partinf.model.families import FAMILIES
from partinf.model.family import Family
from partinf.model.hf_config import config_from_hf
from partinf.model.hf_write import config_to_hf
from partinf.model.load import config_from_toml, config_to_toml, load_model_config
from partinf.planner.question import Question
from partinf.plans import Plan
from partinf.workload import Workload
from tests.core.small_files import small_file

PUBLISHED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "fixtures" / "published_configs.json").read_text())
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "max_position_embeddings": 128,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "vocab_size": 96,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def offences(data: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(InvalidInput) as caught:
        config_from_hf(data, "mine")
    return tuple(line.removeprefix("mine: config.json: ").removeprefix("model mine: ") for line in caught.value.offences)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read(name: str) -> None:
    """With the keys that the models were published with, and with every key that two versions of transformers know."""
    found = config_from_hf(PUBLISHED[name], "mine")
    assert FAMILIES[found.family].architecture == PUBLISHED[name]["architectures"][0]


@pytest.mark.parametrize(
    "published, shipped",
    [
        ("Llama 3 8B", "llama-3-8b"),
        ("Qwen 3 0.6B", "qwen-3-0.6b"),
        ("Qwen 3 32B", "qwen-3-32b"),
        ("OPT 66B", "opt-66b"),
        ("Mistral 7B v0.1", "mistral-7b-v0.1"),
        ("Mistral 7B v0.3", "mistral-7b"),
        ("Mistral Nemo 12B", "mistral-nemo"),
        ("Gemma 3 1B", "gemma-3-1b"),
        ("Gemma 3 4B, the part for text", "gemma-3-4b"),
        ("OLMo 2 32B", "olmo-2-32b"),
    ],
)
def test_published_files_describe_the_shipped_models(published: str, shipped: str) -> None:
    ours, found = vars(load_model_config(shipped)), vars(config_from_hf(PUBLISHED[published], shipped))
    assert {key for key, value in ours.items() if found[key] != value} <= {"source"}


@pytest.mark.parametrize(
    "key, value",
    [
        ("logit_scale", 0.25),
        ("embedding_multiplier", 12.0),
        ("attention_multiplier", 0.1),
        ("num_local_experts", 8),
        ("rotary_pct", 0.25),
        ("no_rope_layers", [1, 1, 0]),
        ("attention_chunk_size", 4),
        ("use_rope", False),
        ("final_logit_softcapping", 30.0),
        ("sliding_window", 16),  # which Llama's own code does not read
    ],
)
def test_a_key_that_is_not_read_is_refused(key: str, value: Any) -> None:
    (line,) = offences(LLAMA | {key: value})
    assert line == f"{key} = {json.dumps(value)} is not known to partinf and may change the result; delete the key if it does not"
    assert config_from_hf(LLAMA | {key: None}, "mine") == config_from_hf(LLAMA, "mine")  # null asks for nothing


def test_a_file_of_another_kind_does_not_fill_the_screen() -> None:
    found = offences(LLAMA | {f"key{number}": number for number in range(500)})
    assert len(found) == 21
    assert found[-1] == "480 more keys are not known"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported; heads are rotated whole, which is 1.0"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters: partial_rotary_factor = 0.5"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            "rope_parameters has a rotation for each of full_attention, sliding_attention; this family has one for all layers",
        ),
        ({"rope_theta": 500000.0, "rope_parameters": {"rope_theta": 10000.0}}, "rope_theta = 500000, and 10000 in rope_parameters"),
        ({"rope_scaling": {"type": "linear", "rope_type": "default"}}, 'rope type "linear" is not supported'),
        ({"rope_scaling": {"type": "su"}}, "supported: 'default', 'linear', 'llama3', 'yarn', 'longrope', 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: linear rope scaling lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rotation: factor = 0.0; a number from"),
        ({"rope_scaling": YARN | {"beta_fast": "x"}}, 'rope_scaling: beta_fast = "x"; a number is needed'),
        ({"rope_scaling": YARN | {"truncate": 1}}, "rope_scaling: truncate = 1; true or false is needed"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max_len = 0; it must be at least 1"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "yarn scaling needs a theta above 1, found 1"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0]}}, "long_factor has 1 factors; one for each of the 4 rotated pairs is needed"),
        ({"rope_scaling": LONGROPE | {"short_factor": 1.0}}, "rope_scaling: short_factor = 1.0; a list of numbers is needed"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0, None, 1, 1]}}, "short_factor = [1.0, null, 1, 1]; a list of numbers is needed"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, "rope_scaling: mrope_section = [1, 1, 2] is not known"),
        ({"rope_scaling": LLAMA3 | {"attention_factor": 1.2}}, "rope_scaling: attention_factor = 1.2 is not known"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor = 4.0; it must be below high_freq_factor = 4.0"),
        ({"rope_scaling": {"type": ["llama3"]}}, 'rope type ["llama3"] is not supported'),
        ({"rope_scaling": "linear"}, 'rope_scaling = "linear"; an object is needed'),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "rope_scaling: factor = null; a number is needed"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": float("inf")}}, "original_max_position_embeddings = Infinity"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32.5}}, "= 32.5; a whole number is needed"),
    ],
)
def test_rotations_that_are_not_computed(change: dict[str, Any], words: str) -> None:
    (line,) = offences(LLAMA | change)
    assert words in line


def test_rotations_without_effect_and_in_both_spellings() -> None:
    plain = config_from_hf(LLAMA, "mine")
    assert config_from_hf(LLAMA | {"partial_rotary_factor": 1.0, "rope_scaling": {}}, "mine") == plain
    assert config_from_hf(LLAMA | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1}}, "mine") == plain
    scaled = config_from_hf(LLAMA | {"rope_scaling": LLAMA3, "rope_theta": 500000.0}, "mine")
    both = {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 500000.0}, "rope_theta": 500000.0}
    assert config_from_hf(LLAMA | both, "mine") == scaled != plain


def test_of_two_rotations_the_scaling_of_version_4_is_meant() -> None:
    """As transformers 5 reads such a file; theta then comes from the key next to it, or from the family, not from what is not used."""
    both = {"rope_scaling": YARN, "rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}
    assert config_from_hf(LLAMA | both, "mine") == config_from_hf(LLAMA | {"rope_scaling": YARN}, "mine")


def test_lengths_of_the_training_stand_outside_within_or_are_the_longest_context() -> None:
    def trained(change: dict[str, Any]) -> int:
        return config_from_hf(LLAMA | change, "mine").rotation.scaling.original_max_len  # type: ignore[union-attr]

    within = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}
    assert trained({"rope_scaling": YARN}) == 32
    assert trained({"rope_scaling": YARN, "original_max_position_embeddings": 16}) == 16
    assert trained({"rope_scaling": within, "max_position_embeddings": 64}) == 64


def test_what_scaling_makes_of_the_longest_context() -> None:
    """A file of YaRN may state the length of the training, and one of dynamic scaling always does."""
    for scaling, stated, longest in ((YARN, 32, 128), (YARN, 256, 256), ({"rope_type": "dynamic", "factor": 2.0}, 32, 64)):
        found = config_from_hf(LLAMA | {"rope_scaling": scaling, "max_position_embeddings": stated}, "mine")
        assert found.max_len == longest
        assert config_from_hf(config_to_hf(found), "mine") == found
        assert config_from_toml(config_to_toml(found), "mine") == replace(found, name="mine")


@pytest.mark.parametrize(
    "base, change, words",
    [
        (LLAMA, {"layer_types": ["chunked_attention"] * 3}, 'layer_types: "chunked_attention" is not supported; supported: full_attention'),
        (LLAMA, {"layer_types": ["sliding_attention"] * 3}, 'layer_types: "sliding_attention" is not supported'),
        (QWEN3, {"layer_types": ["chunked_attention"] * 3}, "supported: full_attention, sliding_attention"),
        (QWEN3, {"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries; the model has 3 layers"),
        (QWEN3, {"layer_types": [3, None, {}]}, "layer_types: 3 is not supported"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 3}, "asks for sliding_attention, but there is no sliding_window"),
        (QWEN3, {"use_sliding_window": "yes"}, 'use_sliding_window = "yes"; true or false is needed'),
        (QWEN3, {"use_sliding_window": True, "max_window_layers": "2"}, 'max_window_layers = "2"; a whole number is needed'),
        (MISTRAL, {"sliding_window": "4096"}, 'sliding_window = "4096"; a whole number of at least 1, or null, is needed'),
        (MISTRAL, {"sliding_window": 0}, "sliding_window = 0; a whole number of at least 1, or null, is needed"),
    ],
)
def test_layers_that_are_not_full_attention(base: dict[str, Any], change: dict[str, Any], words: str) -> None:
    assert any(words in line for line in offences(base | change))


@pytest.mark.parametrize(
    "base, change, window",
    [
        (MISTRAL, {}, 4096),  # what the family means by no key
        (MISTRAL, {"sliding_window": None}, 0),
        (MISTRAL, {"sliding_window": 16}, 16),
        (QWEN3, {"sliding_window": 16}, 0),  # not switched on
        (QWEN3, {"use_sliding_window": True}, 0),  # of the layers from 28 on, of which there are none
        (QWEN3, {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 16}, 16),
        (QWEN3, {"use_sliding_window": True, "layer_types": ["full_attention"] * 3}, 0),
        (QWEN3, {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}, 4096),
        (LLAMA, {"layer_types": ["full_attention"] * 3}, 0),
    ],
)
def test_windows(base: dict[str, Any], change: dict[str, Any], window: int) -> None:
    found = config_from_hf(base | change, "mine")
    assert found.least_window == window
    assert found.longest_context == 128
    assert config_from_hf(config_to_hf(found), "mine") == found
    assert config_from_toml(config_to_toml(found), "mine") == found


def test_a_window_does_not_bound_what_is_served_planned_and_simulated() -> None:
    model = config_from_hf(MISTRAL | {"sliding_window": 16}, "mine")
    layout, _ = layout_from_toml('[axes]\nx = "ffn"\n[prefill]\nattention = { x = "heads" }\n[decode]\nattention = { x = "heads" }\n', "l")
    plan = Plan(model, parse_slice("cpu:2"), layout)
    assert with_capacity(plan, Capacity(max_len=128)).max_len == 128
    with pytest.raises(InvalidInput, match="max_len = 129; model mine has a context of 128 tokens"):
        with_capacity(plan, Capacity(max_len=129))
    assert Question(model, Workload(1, input_len=100, output_len=28)).model.windows == ((16, 3),)


def test_sizes_that_mistral_leaves_out() -> None:
    """Eight key-value heads, and 128 Ki positions; null means as many as there are query heads."""
    data = {key: value for key, value in MISTRAL.items() if key not in ("num_key_value_heads", "max_position_embeddings")}
    found = config_from_hf(data | {"num_attention_heads": 16}, "mine")
    assert (found.num_kv_heads, found.max_len) == (8, 131072)
    assert config_from_hf(data | {"num_attention_heads": 16, "num_key_value_heads": None}, "mine").num_kv_heads == 16


@pytest.mark.parametrize(
    "change, words",
    [
        ({"architectures": ["LlamaBidirectionalModel"]}, "describes 'LlamaBidirectionalModel'; supported model types"),
        ({"architectures": ["LlamaForCausalLM", "LlamaForSequenceClassification"]}, "describes 'LlamaForSequenceClassification'"),
        ({"model_type": "granite_speech"}, "describes 'granite_speech'"),
        ({"architectures": {"a": 1}}, 'architectures = {"a": 1}; a list of names is needed'),
        ({"architectures": [3]}, "architectures = [3]; a list of names is needed"),
        ({"model_type": 3}, "model_type = 3; a name is needed"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "models that bring their own code are not supported"),
        ({"auto_map": "modeling.Mine"}, "models that bring their own code are not supported"),
    ],
)
def test_models_of_another_kind(change: dict[str, Any], words: str) -> None:
    (line,) = offences(LLAMA | change)
    assert words in line


def test_model_type_decides_where_names_disagree() -> None:
    """As transformers has it, and the report says where the sizes come from."""
    found = config_from_hf(QWEN3 | {"architectures": ["LlamaForCausalLM"]}, "mine")
    assert found.family == "qwen3"
    assert found.source == "config.json; model_type is 'qwen3', which decides; architectures names LlamaForCausalLM"
    assert replace(found, source="config.json") == config_from_hf(QWEN3, "mine")


def test_a_model_without_its_output_matrix_is_of_its_family() -> None:
    assert config_from_hf(QWEN3 | {"architectures": ["Qwen3Model"]}, "mine") == config_from_hf(QWEN3, "mine")


def test_code_of_a_tokenizer_is_not_the_models() -> None:
    assert config_from_hf(LLAMA | {"auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}}, "mine") == config_from_hf(LLAMA, "mine")


@pytest.mark.parametrize("method, key", [("gptq", "quantization_config"), ("fp8", "quantization_config"), ("", "quantization")])
def test_quantised_checkpoints_are_one_line(method: str, key: str) -> None:
    (line,) = offences(LLAMA | {key: {"quant_method": method, "bits": 4} if method else {"bits": 4, "group_size": 64}})
    assert line.startswith(f"{key} = ")
    assert method in line
    assert "quantised checkpoints are not read" in line


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings = "false"; true or false is needed'),
        ({"rope_theta": None}, "rope_theta = null; a number is needed"),
        ({"rms_norm_eps": None}, "rms_norm_eps = null; a number is needed"),
        ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps = "1e-5"; a number is needed'),
        ({"hidden_size": True}, "hidden_size = true; a whole number is needed"),
        ({"hidden_size": 64.0}, "hidden_size = 64.0; a whole number is needed"),
        ({"max_position_embeddings": None}, "max_position_embeddings = null; a whole number is needed"),
        ({"attention_bias": 0}, "attention_bias = 0; true or false is needed"),
        ({"rope_theta": float("nan")}, "rope_theta = NaN; a number is needed"),
        ({"rms_norm_eps": 1e-38}, "norm_eps = 1e-38; a number from"),
        ({"rope_theta": 0.0}, "rotation: theta = 0.0; a number from 1 to 1e+30"),
        ({"num_hidden_layers": 10**7}, "num_layers = 10000000; it must be at most 4,096"),
        ({"vocab_size": 10**4000}, "it must be at most 16,777,216"),
        ({"num_attention_heads": -8}, "num_heads = -8; it must be at least 1"),
        ({"max_position_embeddings": -1}, "max_len = -1; it must be at least 0"),
        ({"hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 4096, "head_dim": 8}, "more than 1e+15 parameters"),
    ],
)
def test_values_of_another_type_or_beyond_any_range(change: dict[str, Any], words: str) -> None:
    (line,) = offences(LLAMA | change)
    assert words in line
    assert len(line) < 300


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"model_type": "\xff"}', "no UTF-8 text"),
        (b"[" * 100_000, "nested deeper"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "thousands of digits"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 650\n", "`git lfs pull` fetches it"),
        (b"<!DOCTYPE html><html><body>Not Found</body></html>", "an HTML or XML page"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InvalidInput, match=words) as caught:
        load_model_config(tmp_path)
    assert len(caught.value.offences) == 1
    assert str(tmp_path / "config.json") in str(caught.value)


def test_directories_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no config.json in this directory; a Hugging Face model directory or a .toml file is needed"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").symlink_to("gone.json")
    with pytest.raises(InvalidInput, match=r"config.json: a link to gone.json, which is not there"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InvalidInput, match=r"config.json: a directory; a file is needed"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").rmdir()
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(InvalidInput, match="it holds an adapter alone; merge that into its base model"):
        load_model_config(tmp_path)


def test_the_family_of_a_toml_file() -> None:
    assert load_model_config("opt-13b").family == "opt"
    text = config_to_toml(load_model_config("opt-13b"))
    with pytest.raises(InvalidInput, match="norm = layer; the family Llama has rms"):
        config_from_toml(text.replace('"opt"', '"llama"'), "mine")
    with pytest.raises(InvalidInput, match="unknown family 'gtp2'; did you mean 'gpt2'"):
        config_from_toml(text.replace('"opt"', '"gtp2"'), "mine")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_family_is_written_as_itself(family: Family) -> None:
    """With every value of a key that decides its blocks, and with the windows that it has."""
    files = [small_file(family)]
    files += [files[0] | {pick.key: value} for pick in family.picks for value, _ in pick.values]
    files += [files[0] | {bias.key: not bias.absent} for bias in family.biases]
    files += [files[0] | {scalar.key: 0.5} for scalar in family.scalars]
    files += [files[0] | {family.window.key: 16, family.window.flag or "use_cache": True}] if family.window else []
    for file in files:
        model = config_from_hf(file, "mine")
        assert config_to_hf(model)["architectures"] == [family.architecture]
        assert config_from_hf(config_to_hf(model), "mine") == model, file


def test_a_model_is_written_as_another_family_where_its_own_has_no_key() -> None:
    windowed = replace(config_from_hf(LLAMA, "mine"), window=16)
    assert config_from_hf(config_to_hf(windowed), "mine") == replace(windowed, family="mistral")


def test_what_no_file_of_the_family_says_is_not_written() -> None:
    with pytest.raises(InvalidInput) as caught:
        config_to_hf(replace(config_from_hf(LLAMA, "mine"), logit_cap=30.0, qkv_clip=2.0))
    assert caught.value.offences == (
        "model mine: the config.json of a Llama model cannot say that qkv_clip = 2.0, logit_cap = 30.0; save with orbax",
    )
