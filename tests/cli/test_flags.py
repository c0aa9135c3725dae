"""Flags: everything that is wrong on a command line is reported at once, before anything is made."""

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
        "--count is given 2 times: --count x · --count y; give it once",
        "--count y: a whole number is needed, at least 1",
        "--rate 0: a positive number is needed",
        "--kind bf61: valid: bf16, int8, f32; did you mean 'bf16'?",
        "--file /nowhere/x: there is no directory /nowhere",
    )
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "--slice", "v5e:2x2", "--slice", "v5e:2x4"], "--slice is given 2 times: --slice v5e:2x2 · --slice v5e:2x4; give it once"),
        (["plan", "--slice", "v5e:2x2", "--batch", "8", "--batch", "8"], "--batch is given 2 times: --batch 8 · --batch 8"),
        (
            ["simulate", "--slice", "v5e:2x2", "--seed", "1", "--seed=2", "--seed=3"],
            "given 3 times: --seed 1 · --seed 2 · --seed 3",
        ),
        (["explain", "--slice", "v5e:2x2", "--layout", "ws-1d", "--layout", "ws-2d"], "--layout is given 2 times"),
        (["generate", "--prompt", "a", "--prompt", "b", "--max-len", "8", "--max-len", "9"], "--max-len is given 2 times"),
        (["score", "--text", "a", "--text", "b", "--weights", "f32", "--weights", "bf16"], "--weights is given 2 times"),
        (["serve", "--served-model-name", "a", "b", "--served-model-name", "c"], "--served-model-name a b · --served-model-name c"),
        (["serve", "--enable-prefix-caching", "--no-enable-prefix-caching"], "--enable-prefix-caching · --no-enable-prefix-caching"),
        (["bench", "--requests", "1", "--requests", "2"], "--requests is given 2 times"),
    ],
)
def test_a_flag_of_one_value_that_is_given_again_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In every command; a flag that is a list (a prompt, a text) may be given as often as one likes."""
    assert main([*words, "--model", "demo"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(message in line for line in lines), lines
    assert not any("--prompt is" in line or "--text is" in line for line in lines)


def test_what_calibrate_demo_prove_run_and_launch_are_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["calibrate", "--devices", "1", "--devices", "2"],
        ["demo", "--seed", "1", "--seed", "2"],
        ["prove", "--model", "demo", "--slice", "v5e:2x2", "--slice", "v5e:2x4"],
        ["run", "experiment.toml", "--poll-seconds", "1", "--poll-seconds", "2"],
        ["launch", "--plan", "a.toml", "--plan", "b.toml"],
    ):
        assert main(words) == 2, words
        assert "is given 2 times" in capsys.readouterr().err, words


def test_a_command_reads_all_its_flags_before_it_refuses_one(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--max-tokens", "many", "--top-p", "²", "--weights", "f16", "--format", "xml", "--max-len", "1e3", "--layout", "ws-9d"]
    assert main(["generate", "--model", "dmo", "--prompt", "x", *wrong]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    for word in ("dmo", *(flag for flag in wrong if flag.startswith("--") and flag != "--layout"), "ws-9d"):
        assert any(word in line for line in lines), word
