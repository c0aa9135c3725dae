"""The command line's own part: finding a command, loading only it, and exit codes."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from partinf.cli import dispatch, main
from partinf.foundation.errors import InvalidInput

Run = Callable[..., subprocess.CompletedProcess[str]]


class FakeCommand(ModuleType):
    """A command module with one argument, whose `run` is given by the test."""

    def __init__(self, body: Callable[[argparse.Namespace], int]) -> None:
        super().__init__("partinf.cli.fake")
        self.body = body

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--batch", type=int, default=1)

    def run(self, args: argparse.Namespace) -> int:
        return self.body(args)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[argparse.Namespace], int]], None]:
    """Installs a command `fake` next to one, `other`, that cannot be imported."""

    def install(body: Callable[[argparse.Namespace], int]) -> None:
        monkeypatch.setitem(sys.modules, "partinf.cli.fake", FakeCommand(body))
        monkeypatch.setattr(dispatch, "COMMANDS", {"fake": "do as the test says", "other": "not there"})

    return install


def _raise(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def body(args: argparse.Namespace) -> int:
        raise error

    return body


def test_the_commands_arguments_reach_it_and_its_code_comes_back(fake) -> None:
    fake(lambda args: args.batch)
    assert main(["fake", "--batch", "7"]) == 7
    assert main(["fake"]) == 1


def test_top_level_help_lists_every_command_and_loads_none(fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(_raise(AssertionError()))
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "do as the test says" in out
    assert "not there" in out


@pytest.mark.parametrize(
    "argv,line",
    [
        ([], "partinf: error: the following arguments are required: COMMAND (see 'partinf --help')"),
        (["fke"], "partinf: error: unknown command 'fke'; did you mean 'fake'? (see 'partinf --help')"),
        (["fake", "--batch", "many"], "partinf fake: error: argument --batch: invalid int value: 'many' (see 'partinf fake --help')"),
        (["fake", "--bach", "2"], "partinf: error: unrecognized arguments: --bach 2 (see 'partinf --help')"),
        (["fake", "--bat", "2"], "partinf: error: unrecognized arguments: --bat 2 (see 'partinf --help')"),
    ],
)
def test_bad_flags_are_one_line_and_code_2(fake, capsys: pytest.CaptureFixture[str], argv: list[str], line: str) -> None:
    fake(lambda args: 0)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err == line + "\n"


def test_bad_input_is_one_line_per_offence_and_code_2(fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(_raise(InvalidInput(["top_p is 2", "batch is 0\nand must be at least 1"])))
    assert main(["fake"]) == 2
    assert capsys.readouterr().err == "partinf: error: top_p is 2\npartinf: error: batch is 0 and must be at least 1\n"


def test_a_failure_is_one_line_and_code_1(fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(_raise(RuntimeError("\nno devices\nframe 1\nframe 2")))
    assert main(["fake"]) == 1
    assert capsys.readouterr().err == "partinf: error: RuntimeError: no devices (--debug shows the traceback)\n"


@pytest.mark.parametrize("argv", [["--debug", "fake"], ["fake", "--debug"]])
def test_debug_lets_a_failure_through(fake, argv: list[str]) -> None:
    fake(_raise(RuntimeError("no devices")))
    with pytest.raises(RuntimeError, match="no devices"):
        main(argv)


def test_debug_by_environment(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(_raise(RuntimeError("no devices")))
    monkeypatch.setenv("PARTINF_DEBUG", "0")
    assert main(["fake"]) == 1
    monkeypatch.setenv("PARTINF_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main(["fake"])


def test_an_interrupt_is_130(fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(_raise(KeyboardInterrupt()))
    assert main(["fake"]) == 130
    assert capsys.readouterr().err == "partinf: interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_leaves_is_not_a_failure(run_python: Run, root: Path) -> None:
    code = (
        "import sys, types\n"
        "from partinf.cli import dispatch\n"
        "fake = types.ModuleType('partinf.cli.fake')\n"
        "fake.add_arguments = lambda parser: None\n"
        "fake.run = lambda args: [print('x' * 80) for _ in range(100_000)] and 0\n"
        "sys.modules[fake.__name__] = fake\n"
        "dispatch.COMMANDS = {'fake': 'write a lot'}\n"
        "sys.exit(dispatch.main(['fake']))\n"
    )
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    os.close(writer)
    os.read(reader, 100)
    os.close(reader)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("partinf ")


def test_python_dash_m(run_python: Run) -> None:
    done = run_python("-m", "partinf", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: partinf ")
    assert all(command in done.stdout for command in dispatch.COMMANDS)


def test_every_command_of_the_table_is_a_module() -> None:
    assert [name for name in dispatch.COMMANDS if importlib.util.find_spec(f"partinf.cli.{name}") is None] == []


@pytest.mark.parametrize("command", [*dispatch.COMMANDS, None])
def test_help_imports_nothing_heavy(run_python: Run, command: str | None) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    code = (
        "import sys\n"
        "from partinf.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as stop:\n"
        "    print(*sys.modules, file=sys.stderr)\n"
        "    sys.exit(stop.code)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert not set(done.stderr.split()) & {"numpy", "jax", "rich", "flax"}  # what would take its time; experiments/planner_speed measures
