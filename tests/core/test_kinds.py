"""Layers of several kinds: their order, how files write it, and what is refused."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import fields
from pathlib import Path

import pytest

from partinf.foundation.errors import InvalidInput
from partinf.model.config import ModelConfig
from partinf.model.kinds import Kind, pattern_of, runs_of
from partinf.model.load import config_from_toml, config_to_toml
from partinf.model.rotation import Linear, Rotation

REQUIRED = "num_layers = 8\nembed_dim = 64\nffn_dim = 192\nnum_heads = 8\nnum_kv_heads = 4\nhead_dim = 8\nvocab_size = 512\n"
LOCAL_AND_GLOBAL = """
prefix = "global"
pattern = "2 local, global"
window = 16
rotation = { theta = 1e6, scaling = "linear", factor = 8.0 }
[kinds.local]
rotation = { theta = 1e4 }
[kinds.global]
window = 0
"""


def listed(num_layers: int, prefix: tuple[str, ...], period: tuple[str, ...]) -> list[str]:
    return list(itertools.islice(itertools.chain(prefix, itertools.cycle(period)), num_layers))


def test_a_file_of_two_kinds() -> None:
    model = config_from_toml(REQUIRED + LOCAL_AND_GLOBAL, "mine")
    local, everywhere = model.layer_kinds
    assert (local.attention.window, local.attention.rotation) == (16, Rotation(1e4))
    assert (everywhere.attention.window, everywhere.attention.rotation) == (0, Rotation(1e6, scaling=Linear(8.0)))
    assert model.kind_of_layers == (1, 0, 0, 1, 0, 0, 1, 0)
    assert [(run.first, run.kinds, run.repeats) for run in model.runs] == [(0, (1,), 1), (1, (0, 0, 1), 2), (7, (0,), 1)]
    assert config_from_toml(config_to_toml(model), "mine") == model


def test_layers_without_rotation() -> None:
    text = REQUIRED + 'pattern = "3 turned, still"\n[kinds.turned]\n[kinds.still]\nrotation = false\n'
    model = config_from_toml(text, "mine")
    assert [model.layer_kinds[kind].attention.rotation for kind in model.kind_of_layers] == [*[Rotation()] * 3, None] * 2
    assert config_from_toml(config_to_toml(model), "mine") == model


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('pattern = "local"\n', "local is no kind of layer; kinds: none"),
        ("[kinds.local]\nwindow = 4\n", "kinds of layers need a pattern"),
        ('pattern = "local"\n[kinds.local]\n[kinds.other]\n', "kind other stands nowhere in the pattern"),
        ('pattern = "x local"\n[kinds.local]\n', "names of kinds are needed, with a number before one that repeats"),
        ('prefix = "9 local"\npattern = "local"\n[kinds.local]\n', "the prefix has 9 layers; the model has 8"),
        ('pattern = "9999 local, 9999 local"\n[kinds.local]\nwindow = -1\n', "expected a whole number"),
        ('pattern = "local"\n[kinds.local]\nwindows = 4\n', "unknown key 'windows'; did you mean 'window'"),
        ('pattern = "local"\n[kinds.local]\nrotation = { dims = 3 }\n', "kind local: rotation: dims = 3; pairs need an even number"),
        ('block = "parallel"\nnorms = "after"\n', "a parallel block has its norms before its sublayers"),
        ('norm = "rms1p"\n', "expected one of rms, rms-1p, layer, layer-1p, layer-no-bias, layer-bare"),
        ("logit_cap = -1.0\n", "logit_cap = -1.0; expected a number"),
        ("residual_scale = 0\n", "residual_scale = 0.0; a number from"),
    ],
)
def test_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        config_from_toml(REQUIRED + text, "mine")
    assert words in "\n".join(caught.value.offences)


def test_a_misspelled_kind_is_named_with_all_other_offences() -> None:
    text = REQUIRED.replace("num_layers", "num_layer") + 'pattern = "lokal, global"\n[kinds.local]\nwindows = 4\n[kinds.global]\n'
    with pytest.raises(InvalidInput) as caught:
        config_from_toml(text, "mine")
    found = "\n".join(caught.value.offences)
    words = ("'num_layer'; did you mean 'num_layers'", "lokal is no kind of layer; did you mean 'local'?", "did you mean 'window'")
    assert all(part in found for part in words), found


def test_the_order_of_kinds_is_checked_with_sizes() -> None:
    kinds = (Kind("near", 4), Kind("far"))
    with pytest.raises(InvalidInput) as caught:
        ModelConfig("mine", 2, 0, 64, 8, 2, 8, 250, kinds=kinds, pattern=("nearer",))
    found = "\n".join(caught.value.offences)
    words = ("embed_dim = 0", "nearer is no kind of layer; did you mean 'near'?", "kind far stands nowhere in the pattern")
    assert all(part in found for part in words), found


def test_kinds_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidInput, match="2 kinds of layers, of 1 names"):
        ModelConfig("mine", 2, 64, 64, 8, 2, 8, 250, kinds=(Kind("a"), Kind("a", 4)), pattern=("a",))


def test_runs_list_every_layer_once() -> None:
    rng = random.Random(0)
    for _ in range(200):
        prefix, period = (tuple(rng.choices((0, 1, 2), k=rng.randint(low, 5))) for low in (0, 1))
        count = rng.randint(max(len(prefix), 1), 20)
        runs = runs_of(count, prefix, period)
        found = [kind for run in runs for kind in run.kinds * run.repeats]
        assert found == listed(count, prefix, period)
        assert [run.first for run in runs] == [0, *itertools.accumulate(run.num_layers for run in runs)][: len(runs)]


@pytest.mark.parametrize(
    ("names", "prefix", "period"),
    [
        ("llllll", "", "l"),
        ("lllllglllllgll", "", "lllllg"),
        ("fffffffsss", "fffffff", "s"),
        ("lglglg", "", "lg"),
        ("dmmmm", "d", "m"),
        ("g", "", "g"),
    ],
)
def test_the_shortest_pattern_of_a_list(names: str, prefix: str, period: str) -> None:
    assert pattern_of(tuple(names)) == (tuple(prefix), tuple(period))


def test_a_pattern_says_what_the_list_says() -> None:
    rng = random.Random(1)
    for _ in range(300):
        names = tuple(rng.choices("ab", k=rng.randint(1, 12)))
        assert listed(len(names), *pattern_of(names)) == list(names)


def test_the_page_on_architectures_names_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs/architectures.md").read_text()
    assert [field.name for field in fields(ModelConfig) if f"`{field.name}`" not in page] == ["name", "kinds"]
    example, mixture = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    model = config_from_toml(REQUIRED + example, "mine")
    assert [model.kinds[kind].name for kind in model.kind_of_layers] == ["full"] * 2 + ["sliding"] * 5 + ["full"]
    pattern = 'prefix = "dense"\npattern = "mixed"\n'
    mixed = config_from_toml(pattern + REQUIRED + mixture + "\n[kinds.mixed]\n", "mine")
    assert [mixed.layer_kinds[kind].experts is not None for kind in mixed.kind_of_layers] == [False] + [True] * (mixed.num_layers - 1)
