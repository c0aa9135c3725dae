"""An installation without extras: it plans, explains and simulates, has no jax, and names the extra where something is missing."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pytest

# Runs commands one after the other in one process and tells what each printed, what it returned, and what was imported in the end.
_RUN = """
import contextlib, io, json, sys
from partinf.cli import main
found = []
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(command)
        except SystemExit as end:
            code = end.code
    found.append((code, out.getvalue(), err.getvalue()))
print(json.dumps((found, sorted(sys.modules))))
"""
_DECODE = ["--model", "demo", "--slice", "v5e:2x2", "--phase", "decode", "--batch", "8", "--context", "64"]
_SIMULATED = ["--requests", "4", "--lengths", "fixed:16:4"]


def _closure(wanted: list[str]) -> set[str]:
    """Distributions that these requirements bring without extras, with what they need in turn."""
    found: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        name = re.match(r"[A-Za-z0-9._-]+", requirement)[0]
        if name not in found and "extra ==" not in requirement and "python_version" not in requirement:
            found.add(name)
            wanted += metadata.requires(name) or []
    return found


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """The interpreter of an environment that has what pyproject.toml asks of every installation, this checkout, and nothing else."""
    folder = tmp_path_factory.mktemp("light")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in _closure(list(tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"])):
        for top in {file.parts[0] for file in metadata.files(name) or () if file.parts[0] != ".."}:
            (packages / top).symlink_to(metadata.distribution(name).locate_file(top))
    (packages / "partinf.pth").write_text(f"{root}\n")
    return folder / "bin" / "python"


def _main(python: Path, *commands: list[str]) -> tuple[list[tuple[int, str, str]], set[str]]:
    done = subprocess.run([python, "-I", "-c", _RUN, json.dumps(commands)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found, modules = json.loads(done.stdout)
    return found, set(modules)


def test_it_plans_explains_and_simulates(light: Path, tmp_path: Path) -> None:
    plan = str(tmp_path / "plan.toml")
    whole = ["--model", "demo", "--slice", "v5e:2x2", "--batch", "4", "--input", "64", "--output", "16", "--save", plan]
    described = tmp_path / "some.toml"
    described.write_text('model = "demo"\nslice = "cpu:2x2"\nlayout = "ws-2d"\nweights = "f32"\nrequests = 2\nrounds = 0\n')
    found, modules = _main(
        light,
        ["--help"],
        ["plan", "--help"],
        ["plan", *_DECODE],
        ["plan", *whole],
        ["plan", "--html", str(tmp_path / "page.html"), "--format", "json", *_DECODE],
        ["explain", *_DECODE],
        ["simulate", "--plan", plan, *_SIMULATED],
        ["simulate", "--as-served", "--model", "demo", "--slice", "cpu:2x2", *_SIMULATED],
        ["run", str(described)],
        ["launch", "--plan", plan, "--manifest"],
    )
    assert [(code, err) for code, _, err in found if code] == []
    assert all(out for _, out, _ in found)
    assert not modules & {"jax", "numpy", "tokenizers"}


def test_what_runs_a_model_names_the_extra(light: Path, tmp_path: Path) -> None:
    described = tmp_path / "some.toml"
    described.write_text('model = "demo"\nslice = "cpu:2x2"\nlayout = "ws-2d"\nweights = "f32"\nrequests = 2\nrounds = 0\n')
    commands = {
        "run": [
            ["generate", "--model", "demo", "--prompt", "sort: b a ="],
            ["score", "--model", "demo", "--text", "sort: b a ="],
            ["bench", "--model", "demo"],
            ["demo"],
            ["calibrate"],
            ["plan", "--slice", "local", "--model", "demo"],
            ["simulate", "--slice", "local", "--model", "demo"],
            ["run", str(described), "--on", "here"],
            ["run", str(described), "--on", "processes"],
        ],
        "serve": [["serve", "--model", "demo"]],
        "proof": [["prove", *_DECODE], ["plan", "--prove", *_DECODE]],
        "plot": [["plan", "--plot", str(tmp_path / "a.png"), *_DECODE]],
    }
    tried = [(extra, command) for extra, several in commands.items() for command in several]
    found, _ = _main(light, *(command for _, command in tried))
    for (extra, command), (code, out, err) in zip(tried, found, strict=True):
        assert code == 2, command
        assert out == ""
        assert [f"pip install 'partinf[{extra}]'" in line for line in err.splitlines() if " needs " in line][:1] == [True], err
        assert "Traceback" not in err


def test_the_library_says_so_too(light: Path) -> None:
    code = """
import partinf
steps = partinf.plan("demo", "cpu:1")
assert steps.layout
for call in (lambda: partinf.load("demo"), lambda: partinf.plan("demo"), lambda: partinf.prove(steps, steps.buckets)):
    try:
        call()
    except partinf.InvalidInput as error:
        print(error)
"""
    done = subprocess.run([light, "-I", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    extras = [line.partition("pip install ")[2] for line in done.stdout.splitlines()]
    assert extras == ["'partinf[run]'", "'partinf[run]'", "'partinf[proof]'"]


def test_a_whole_installation_misses_nothing() -> None:
    from partinf.foundation import extras

    assert [extras.missing(extra, "this") for extra in extras.MODULES] == [None] * 4


def test_lines_of_few_and_many_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    from partinf.foundation import extras

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert extras.missing("plot", "--plot") == "--plot needs matplotlib, not installed here: pip install 'partinf[plot]'"
    some = extras.missing("run", "this", ("jax", "numpy"))
    assert some == "this needs jax and numpy, not installed here: pip install 'partinf[run]'"
    assert extras.missing("serve", "this").startswith("this needs jax, numpy and 15 more, not installed here: ")
    assert (extras.extra_of("jax.numpy"), extras.extra_of("starlette"), extras.extra_of("json"), extras.extra_of(None)) == (
        "run",
        "serve",
        None,
        None,
    )


def test_a_module_that_is_missed_underway_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from partinf.cli import explain, main

    def gone(args: object) -> int:
        raise ModuleNotFoundError("No module named 'jax'", name="jax.numpy")

    monkeypatch.setattr(explain, "run", gone)
    assert main(["explain", *_DECODE]) == 2
    assert capsys.readouterr().err == "partinf: error: partinf explain needs jax, not installed here: pip install 'partinf[run]'\n"
