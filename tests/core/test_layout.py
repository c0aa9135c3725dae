"""Layouts: roles, names for the reader, files, and everything that is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput
from partinf.layout import AttentionRole, Role, attention_name, ffn_name, head_axes, kv_head_axes
from partinf.layout.files import layout_from_toml, layout_to_toml, make_layout

SIZES = {"x": 4, "y": 4, "z": 4}
TWO_D = {"x": "embed", "y": "ffn", "z": "ffn"}
BATCH = dict.fromkeys("xyz", "batch")


@pytest.mark.parametrize(
    ("storage", "gather", "name"),
    [
        (dict.fromkeys("xyz", "ffn"), "", "ws-1d"),
        (TWO_D, "", "ws-2d"),
        (TWO_D, "x", "wg-x"),
        (TWO_D, "xy", "wg-xy"),
        (TWO_D, "xyz", "wg-xyz"),
        (dict.fromkeys("xyz", "embed"), "", "other"),
        (TWO_D, "y", "other"),
    ],
)
def test_names_of_the_ffn(storage: dict[str, str], gather: str, name: str) -> None:
    layout = make_layout(storage, BATCH, decode_gather=gather)
    assert ffn_name(layout, layout.decode, SIZES) == name


@pytest.mark.parametrize(
    ("roles", "name"), [("hhh", "heads"), ("bbb", "batch"), ("bbn", "batch"), ("hbb", "mixed"), ("sss", "sequence")], ids=str
)
def test_names_of_attention(roles: str, name: str) -> None:
    words = {"h": "heads", "b": "batch", "n": "none", "s": "sequence"}
    layout = make_layout(TWO_D, {axis: words[letter] for axis, letter in zip("xyz", roles, strict=True)})
    assert attention_name(layout.decode, SIZES) == name


@pytest.mark.parametrize("name", resources.names("layouts"))
def test_shipped_layouts_are_what_they_are_called(name: str) -> None:
    layout, rest = layout_from_toml(resources.find("layouts", name).read_text(), name)
    assert rest["description"]
    if name[:2] in ("ws", "wg"):
        phase = layout.decode if name.startswith("ws") else layout.prefill
        assert ffn_name(layout, phase, SIZES) == name


def test_head_axes_are_the_stored_ones_first() -> None:
    layout = make_layout(TWO_D, {"x": "heads", "y": "heads", "z": "batch"})
    assert head_axes(layout) == ("y", "z", "x")
    assert kv_head_axes(layout, SIZES, 16) == ("y", "z")
    assert kv_head_axes(layout, SIZES, 8) == ("y",)
    assert kv_head_axes(layout, SIZES, 1) == ()


@pytest.mark.parametrize(
    ("storage", "attention", "gather", "words"),
    [
        (TWO_D, BATCH, "w", "gathers over 'w', which is no axis"),
        ({**TWO_D, "x": "replica"}, BATCH, "x", "stores no shard of the weights"),
        (TWO_D, {"x": "batch", "y": "batch"}, "", "axis 'z' has no attention role"),
        (TWO_D, {**BATCH, "w": "heads"}, "", "attention role for 'w'"),
        ({**TWO_D, "x": "embd"}, BATCH, "", "unknown role 'embd'; did you mean 'embed'"),
    ],
)
def test_refused(storage: dict[str, str], attention: dict[str, str], gather: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        make_layout(storage, attention, decode_gather=gather)


def test_unknown_keys_name_the_nearest() -> None:
    text = layout_to_toml(make_layout(TWO_D, BATCH)).replace("gather", "gathr", 1)
    with pytest.raises(InvalidInput, match="unknown key 'gathr'; did you mean 'gather'"):
        layout_from_toml(text, "a file")


def test_all_offences_of_a_file_at_once() -> None:
    text = (
        layout_to_toml(make_layout(TWO_D, BATCH))
        .replace("gather", "gathr", 1)
        .replace('"embed"', '"embd"')
        .replace('z = "batch"', 'w = "batc"')
    )
    with pytest.raises(InvalidInput) as caught:
        layout_from_toml(text, "a file")
    printed = "\n".join(caught.value.offences)
    for words in ("unknown key 'gathr'", "unknown role 'embd'", "unknown role 'batc'", "axis 'z' has no attention role", "role for 'w'"):
        assert words in printed, words


@given(
    st.tuples(*[st.sampled_from([role.value for role in (Role.EMBED, Role.FFN, Role.REPLICA)])] * 3),
    st.tuples(*[st.sampled_from([role.value for role in AttentionRole])] * 3),
    st.tuples(*[st.sampled_from([role.value for role in AttentionRole])] * 3),
    st.sets(st.sampled_from("xyz")),
)
def test_files_are_read_back(stored: tuple[str, ...], decode: tuple[str, ...], prefill: tuple[str, ...], gather: set[str]) -> None:
    storage = dict(zip("xyz", stored, strict=True))
    kept = sorted(axis for axis in gather if storage[axis] != "replica")
    roles = (dict(zip("xyz", words, strict=True)) for words in (decode, prefill))
    layout = make_layout(storage, *roles, prefill_gather=kept)
    assert layout_from_toml(layout_to_toml(layout, 'description = "x"'), "a file") == (layout, {"description": "x"})
