"""Architectures: TOML files, read and written, and everything that is refused."""

from __future__ import annotations

import pytest

from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput
from partinf.model.config import ModelConfig
from partinf.model.load import config_from_toml, config_to_toml, load_model_config

REQUIRED = "num_layers = 2\nembed_dim = 64\nffn_dim = 192\nnum_heads = 8\nnum_kv_heads = 4\nhead_dim = 8\nvocab_size = 512\n"


@pytest.mark.parametrize("name", [name for name in resources.names("models") if resources.find("models", name).suffix == ".toml"])
def test_shipped_files_are_read_back(name: str) -> None:
    config = load_model_config(name)
    assert config_from_toml(config_to_toml(config), name) == config


def test_all_offences_of_a_file_at_once() -> None:
    text = REQUIRED.replace("vocab_size", "vocabsize") + 'gated = 1\nblock = "paralel"\n'
    with pytest.raises(InvalidInput) as caught:
        config_from_toml(text, "mine")
    found = "\n".join(caught.value.offences)
    for words in (
        "unknown key 'vocabsize'; did you mean 'vocab_size'",
        "'vocab_size' is missing",
        "gated = 1; expected true or false",
        "'paralel'",
    ):
        assert words in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("num_layers = 2", "num_layers = 0"), "num_layers = 0; it must be at least 1"),
        (("num_kv_heads = 4", "num_kv_heads = 3"), "do not share 3 kv heads evenly; valid: 1, 2, 4, 8"),
        (("head_dim = 8", "head_dim = 7"), "even head_dim"),
        (("num_layers = 2", "num_layers ="), "not a TOML file"),
    ],
)
def test_refused(change: tuple[str, str], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        config_from_toml(REQUIRED.replace(*change), "mine")


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(InvalidInput, match="did you mean 'palm-540b'"):
        load_model_config("palm-540")


def test_padded_vocabulary_depends_on_the_model_alone() -> None:
    assert ModelConfig("a", 1, 8, 8, 1, 1, 8, 50257).padded_vocab_size == 53248
    assert ModelConfig("a", 1, 8, 8, 1, 1, 8, 500).padded_vocab_size == 512


def test_padded_heads() -> None:
    multihead = ModelConfig("a", 1, 64, 64, 12, 12, 8, 512)
    assert multihead.with_padded_heads(16).num_kv_heads == 16
    grouped = ModelConfig("a", 1, 64, 64, 12, 4, 8, 512)
    assert grouped.with_padded_heads(16).num_kv_heads == 4
    assert grouped.with_padded_heads(0) is grouped
