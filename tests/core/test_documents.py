"""Files of users: whatever they are, reading them ends in a value or in offences that say what is wrong."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path

import pytest

from partinf.foundation.documents import (
    MAX_NESTING,
    TOML_BYTES,
    Table,
    is_file,
    json_of,
    read_bytes,
    read_json,
    read_text,
    read_toml,
    shown,
    toml_of,
)
from partinf.foundation.errors import InvalidInput


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


def refusal(call: object, *args: object, **named: object) -> str:
    with pytest.raises(InvalidInput) as error:
        call(*args, **named)  # type: ignore[operator]
    return str(error.value)


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    broken = tmp_path / "link"
    broken.symlink_to(tmp_path / "gone")
    assert "a directory" in refusal(read_text, tmp_path)
    assert "no such file" in refusal(read_text, tmp_path / "none", "--plan none")
    assert "which is not there" in refusal(read_text, broken)
    assert "it cannot be read" in refusal(read_text, Path("a" * 5000))
    assert "no such file" in refusal(read_text, Path("a\0b"))
    assert not any(is_file(name) for name in (tmp_path, tmp_path / "none", broken, "a" * 5000, "a\0b"))
    assert read_text(Path("/dev/null")) == ""


def test_no_more_than_the_bound_is_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"#" * (TOML_BYTES + 1))
    assert "more than 262,144 bytes" in refusal(read_toml, tmp_path / "large")
    assert "more than 1,000 bytes" in refusal(read_bytes, Path("/dev/zero"), most=1000)


def test_text_is_utf8_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"\xef\xbb\xbfa = 'b'\n")
    assert read_toml(file) == {"a": "b"}
    file.write_bytes(b"a = 1\nb = '\xff'\n")
    assert "byte 0xff in line 2" in refusal(read_toml, file)
    for start, kind in ((b"GGUF\x03\0\0\0\xf0", "a GGUF file"), (b"\xff\xfea\0", "UTF-16"), (b"\x80\0\0\0\0\0\0\0{}", "safetensors")):
        file.write_bytes(start)
        assert kind in refusal(read_json, file)
    for text, kind in (("<!DOCTYPE html>", "HTML"), ("version https://git-lfs.github.com/spec/v1\noid", "git lfs pull")):
        file.write_text(text)
        assert kind in refusal(read_json, file)


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 5000,
        "x = " + "{a = " * 5000,
        "a." * 60_000 + "a = 1",
        '"a" . ' * 30_000 + "a = 1",
        "[" + "a." * 1000 + "a]\n",
        "x = {" + "b." * 1000 + "b = 1}",
        "x = " + "[" * (MAX_NESTING + 1) + "]" * (MAX_NESTING + 1),
    ],
)
def test_nesting_of_toml_is_bounded(text: str) -> None:
    started = time.perf_counter()
    assert "nested deeper than 64 levels" in refusal(toml_of, text, "file")
    assert time.perf_counter() - started < 2


def test_json_that_readers_would_stumble_over_is_refused() -> None:
    assert "nested deeper" in refusal(json_of, "[" * 100_000, "file")
    assert "nested deeper" in refusal(json_of, '{"a":' * 65 + "1" + "}" * 65, "file")
    assert "stands twice in one object: 'a'" in refusal(json_of, '{"a": 1, "a": 2}', "file")
    assert "thousands of digits" in refusal(json_of, "9" * 5000, "file")
    assert "half a surrogate pair" in refusal(json_of, '{"a": ["\\uD800"]}', "file")
    assert json_of('{"a": "\\ud83d\\ude00"}', "file") == {"a": "\N{GRINNING FACE}"}
    assert json_of(b'\xef\xbb\xbf[1, "x"]', "file") == [1, "x"]


def test_a_table_collects_what_is_wrong_with_each_key() -> None:
    offences: list[str] = []
    data = toml_of(
        """
        batch = 8.0
        rate = nan
        names = ["a", 1]
        kind = "green"
        on = 1
        roles = { x = 3 }
        nmae = "typo"
        huge = 0x%s
        sub = [1]
        """
        % ("f" * 10_000),
        "file",
    )
    table = Table(data, "file", offences)
    table.text("name")
    table.whole("batch", low=1)
    table.whole("huge", high=10)
    table.number("rate")
    table.texts("names")
    table.choice("kind", Colour)
    table.flag("on")
    table.words("roles")
    assert table.table("sub").text("inner", default="y") == "y"
    table.refuse_unknown()
    assert offences == [
        "file: 'name' is missing; expected a string",
        "file: batch = 8.0; expected a whole number of at least 1",
        "file: huge = (a whole number of 12042 digits); expected a whole number from 0 to 10",
        "file: rate = nan; expected a number of at least 0",
        "file: names = ['a', 1]; expected a list of strings",
        "file: kind = 'green'; expected one of red, blue",
        "file: on = 1; expected true or false",
        "file: roles = {'x': 3}; expected a table of strings",
        "file: sub = [1]; expected a table",
        "file: unknown key 'nmae'; did you mean 'name'?",
    ]


def test_a_table_gives_what_is_right_by_its_type() -> None:
    offences: list[str] = []
    table = Table({"n": 3, "x": 2, "y": float("inf"), "c": "blue", "t": ["a"], "r": [{"k": 1}], "f": [1, 2.5]}, "file", offences)
    assert (table.whole("n"), table.whole("m", default=4)) == (3, 4)
    assert (table.number("x"), table.number("y", infinite=True), table.numbers("f")) == (2.0, float("inf"), (1.0, 2.5))
    assert (table.choice("c", Colour), table.texts("t"), table.text("u", default=None)) == (Colour.BLUE, ("a",), None)
    assert [row.whole("k") for row in table.tables("r")] == [1]
    assert table.table("s", default=None) is None
    table.refuse_unknown(("nothing",))
    assert offences == []
    Table([], "file", offences)
    assert offences == ["file: []; expected a table"]


def test_values_in_messages_are_short() -> None:
    assert shown("x" * 1000) == "'" + "x" * 58 + "…"
    assert shown([[1] * 100] * 100)[-1] == "…"
    assert shown(10**5000).endswith("of 5001 digits)")
    assert shown([10**5000]) == "a list"
