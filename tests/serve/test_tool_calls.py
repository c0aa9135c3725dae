"""Calls of tools and reasoning in a model's text, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json
import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partinf.serve.replies import ReplyReader
from partinf.serve.tool_calls import FORMATS, CallReader, Part, format_of

TOOLS = {"f", "get_weather"}
Read = tuple[str, str, list[tuple[str, str]]]


def read(pieces: list[str], form: str | None, *, thinks: bool = False, inside: bool = False, parallel: bool = True) -> Read:
    """Reasoning, content and calls; every call must begin with its name."""
    reader = ReplyReader(thinks, inside, None if form is None else CallReader(FORMATS[form], TOOLS, parallel))
    parts = [reader.push(piece) for piece in pieces]
    parts.append(Part())
    reader.finish(parts[-1])
    calls: dict[int, list[str]] = {}
    for part in parts:
        for piece in part.calls:
            assert (piece.name is not None) == (piece.index not in calls)
            calls.setdefault(piece.index, [piece.name or "", ""])[1] += piece.arguments
    assert list(calls) == list(range(len(calls)))
    content, reasoning = "".join(part.content for part in parts), "".join(part.reasoning for part in parts)
    return reasoning, content, [(name, arguments) for name, arguments in calls.values()]


def every_cut(text: str, form: str | None, **how: Any) -> Read:
    """The same answer whole, sign by sign, and in pieces."""
    whole = read([text], form, **how)
    assert read(list(text), form, **how) == whole
    rng = random.Random(len(text))
    for _ in range(6):
        cuts = [0, *sorted(rng.sample(range(1, len(text)), min(3, len(text) - 1))), len(text)] if len(text) > 1 else [0, len(text)]
        assert read([text[start:end] for start, end in itertools.pairwise(cuts)], form, **how) == whole
    return whole


F, G = '{"a": 1, "b": "x}\\"{"}', '{"city": "Zürich", "days": [1, {"n": null}]}'
CALLS = [("f", F), ("get_weather", G)]


@pytest.mark.parametrize(
    "form, text, content, calls",
    [
        ("hermes", f'<tool_call>\n{{"name": "f", "arguments": {F}}}\n</tool_call>', "", CALLS[:1]),
        (
            "hermes",
            f'Let me see.\n<tool_call>\n{{"name": "f", "arguments": {F}}}\n</tool_call>\n'
            f'<tool_call>{{"arguments": {G}, "name": "get_weather"}}</tool_call>\n',
            "Let me see.",
            CALLS,
        ),
        ("hermes", f'<tool_call>{{"name": "f", "arguments": {json.dumps(F)}}}</tool_call> done', "done", CALLS[:1]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1, 2', "", [("f", '{"a": [1, 2')]),
        ("hermes", "a < b and <tool_cal> c\n", "a < b and <tool_cal> c\n", []),
        ("hermes", "<tool_call>none</tool_call>", "<tool_call>none</tool_call>", []),
        ("hermes", '<tool_call>{"nom": "f"}', '<tool_call>{"nom": "f"}', []),
        ("hermes", "<tool_call>", "<tool_call>", []),
        ("llama3_json", f'{{"name": "f", "parameters": {F}}}', "", CALLS[:1]),
        ("llama3_json", f'<|python_tag|>{{"name": "f", "parameters": {F}}}; {{"name": "get_weather", "parameters": {G}}}', "", CALLS),
        ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ("llama3_json", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
        ("llama3_json", ' The call is {"name": "f", "parameters": {}}', ' The call is {"name": "f", "parameters": {}}', []),
        ("mistral", f'[TOOL_CALLS] [{{"name": "f", "arguments": {F}}}, {{"name": "get_weather", "arguments": {G}}}]', "", CALLS),
        ("mistral", f"Look:[TOOL_CALLS]f{F}[TOOL_CALLS]get_weather{G}", "Look:", CALLS),
        ("mistral", f"[TOOL_CALLS]f[CALL_ID]abc123[ARGS]{F}", "", CALLS[:1]),
        ("mistral", "[TOOL_CALLS]f", "[TOOL_CALLS]f", []),
        ("mistral", "see [1] and [TOOL", "see [1] and [TOOL", []),
        ("pythonic", "[f(a=1, b='x}\"{'), get_weather(city=\"Zürich\", days=[1, {'n': null}])]", "", CALLS),
        ("pythonic", "<|python_start|>[f(a=1, b='x}\"{')]<|python_end|>", "", CALLS[:1]),
        ("pythonic", "[1] is a footnote", "[1] is a footnote", []),
        ("pythonic", "[g(a=1)]", "[g(a=1)]", []),
        ("pythonic", "[f(1, 2)]", "[f(1, 2)]", []),
        ("pythonic", "[f(a=open('x'))]", "[f(a=open('x'))]", []),
        ("pythonic", "[f(a=1", "[f(a=1", []),
        ("pythonic", "Sure: [f(a=1)]", "Sure: [f(a=1)]", []),
    ],
)
def test_calls_of_every_format(form: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert every_cut(text, form) == ("", content, calls)


@pytest.mark.parametrize("form", FORMATS)
def test_text_without_calls_is_as_it_was(form: str) -> None:
    for text in ("", "Hello.\n\n  There.  ", "\n a", "<", "x <|", "{", "[", '{"a": 1} b', "[a, b] c"):
        assert every_cut(text, form) == ("", text, []), text


@given(
    st.lists(
        st.sampled_from(
            [
                '{"name": "f", ',
                '"arguments": ',
                "{",
                "}",
                "[",
                "]",
                '"',
                "\\",
                "<tool_call>",
                "</tool_call>",
                "f(",
                ")",
                "[TOOL_CALLS]",
                "f",
                "[ARGS]",
                "<|python_tag|>",
                ";",
                ",",
                " ",
                "\n",
                "a=1",
                "'",
                "<think>",
                "</think>",
                "ü",
            ]
        ),
        max_size=14,
    ),
    st.sampled_from(sorted(FORMATS)),
    st.booleans(),
)
def test_any_text_is_read_the_same_however_it_is_cut(signs: list[str], form: str, thinks: bool) -> None:
    every_cut("".join(signs), form, thinks=thinks)


def test_the_first_call_alone() -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {F}}}</tool_call><tool_call>{{"name": "f", "arguments": {{}}}}</tool_call>'
    assert every_cut(text, "hermes", parallel=False) == ("", "", CALLS[:1])


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader(FORMATS["hermes"], TOOLS)
    seen = []
    for piece in ('<tool_call>{"name": "f", "arg', 'uments": {"a', '": 1', "}}", "</tool_call>"):
        part = Part()
        reader.push(piece, part)
        seen.append([(call.name, call.arguments) for call in part.calls])
    assert seen == [[("f", "")], [(None, '{"a')], [(None, '": 1')], [(None, "}")], []]


@pytest.mark.parametrize(
    "text, inside, found",
    [
        ("<think>\nLet me see.\n</think>\n\nYes.", False, ("Let me see.", "Yes.")),
        ("Let me see.\n</think>\n\nYes.", True, ("Let me see.", "Yes.")),
        ("\n<think></think>Yes.", False, ("", "Yes.")),
        ("<think>no end", False, ("no end", "")),
        ("Yes, <think> is a mark.", False, ("", "Yes, <think> is a mark.")),
        ("\n Yes.", False, ("", "\n Yes.")),
        ("a < b </think> c", True, ("a < b", " c")),
        ("<thin", False, ("", "<thin")),
    ],
)
def test_reasoning(text: str, inside: bool, found: tuple[str, str]) -> None:
    assert every_cut(text, None, thinks=True, inside=inside)[:2] == found


def test_reasoning_before_calls() -> None:
    text = f'<think>\nf? <tool_call> maybe\n</think>\n\n<tool_call>\n{{"name": "f", "arguments": {F}}}\n</tool_call>'
    assert every_cut(text, "hermes", thinks=True) == ("f? <tool_call> maybe", "", CALLS[:1])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        " " * 200_000 + "x",
        "<tool_call>" + "[" * 100_000,
        '<tool_call>{"name": "f", "arguments": ' + "[" * 100_000,
        "[f(a=" + "[" * 100_000 + ")",
        "[f(a=" + "(" * 5000 + ")" * 5001 + "]",
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_strange_texts_take_little_time(form: str, text: str) -> None:
    started = time.monotonic()
    read([text], form)
    read([text[start : start + 50] for start in range(0, min(len(text), 20_000), 50)], form)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "text, form",
    [
        ("{{ tools }} <tool_call>", "hermes"),
        ("<tool_call><function=", None),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("<|python_tag|>", "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ messages }}", None),
    ],
)
def test_the_format_that_a_template_writes(text: str, form: str | None) -> None:
    assert format_of(text) is (None if form is None else FORMATS[form])
