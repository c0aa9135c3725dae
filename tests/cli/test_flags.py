"""Flags: everything that is wrong on a command line is said at once, before anything is made."""

from __future__ import annotations

import argparse

import pytest

from partinf.cli import main
from partinf.cli.flags import Flags, register
from partinf.foundation.errors import InvalidInput
from partinf.workload import DType


def flags(*words: str) -> Flags:
    parser = argparse.ArgumentParser()
    register(parser)
    for name in ("--count", "--rate", "--kind", "--file"):
        parser.add_argument(name)
    return Flags(parser.parse_args(words))


@pytest.mark.parametrize("text", ["²", "١", "1_0", " 5", "5 ", "1.0", "1e3", "", "nan", "9" * 401, "0x10", "9", "-1"])
def test_what_is_no_whole_number_of_the_range(text: str) -> None:
    found = flags(f"--count={text}")
    assert found.optional_whole("count", 0, 8) is None
    assert found.offences == [f"--count {text}: a whole number is needed, from 0 to 8"]


@pytest.mark.parametrize("text", ["²", "1_0.0", "nan", "inf", "1e400", "-1e400", "", "0x1p3", "1e-5", "2.5", "1.", "-0.0"])
def test_numbers_are_finite_and_of_a_range(text: str) -> None:
    found = flags(f"--rate={text}").optional_number("rate", 0.0, 2.0)
    assert found == {"1e-5": 1e-5, "1.": 1.0, "-0.0": 0.0}.get(text)
    assert str(found) != "-0.0"


def test_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = flags("--count=x", "--rate=0", "--kind=bf61", "--file=/nowhere/x", "--count=y")
    found.whole("count", 1)
    found.number("rate", above=True)
    assert found.member("kind", DType) is DType.BF16
    found.target("file")
    with pytest.raises(InvalidInput) as error:
        found.check()
    assert error.value.offences == (
        "--count y: a whole number is needed, at least 1",
        "--rate 0: a positive number is needed",
        "--kind bf61: valid: bf16, int8, f32; did you mean 'bf16'?",
        "--file /nowhere/x: there is no directory /nowhere",
    )
    assert capsys.readouterr().err == ""


def test_a_flag_that_is_given_again_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    found = flags("--count=3", "--count=4")
    assert found.whole("count") == 4
    found.check()
    found.check()
    assert capsys.readouterr().err == "partinf: note: --count was given more than once; 4 counts, 3 does not\n"


def test_a_command_reads_all_its_flags_before_it_refuses_one(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--max-tokens", "many", "--top-p", "²", "--weights", "f16", "--format", "xml", "--max-len", "1e3", "--layout", "ws-9d"]
    assert main(["generate", "--model", "dmo", "--prompt", "x", *wrong]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    for word in ("dmo", *(flag for flag in wrong if flag.startswith("--") and flag != "--layout"), "ws-9d"):
        assert any(word in line for line in lines), word
