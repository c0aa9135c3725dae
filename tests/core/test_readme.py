"""What README and docs/ say can be done: the library's ten lines run, commands have the flags that they are given, the files that are named
exist, and every page opens with commands that work."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from partinf.cli import dispatch, main
from partinf.cli.flags import Flags
from partinf.cli.model_place import ModelPlace
from partinf.cli.served_engine import ServedEngine

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
READ = [ROOT / "README.md", *PAGES, ROOT / "tpu_scripts" / "README.md"]


def test_the_library_example_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    plan, shown = names["plan"], repr(names["model"])
    compiled, loaded = map(int, re.findall(r", (\d+) programs compiled, (\d+) loaded>$", shown)[0])  # loaded: from a cache of earlier runs
    assert shown == f"<Model by {plan!r}, {compiled} programs compiled, {loaded} loaded>"
    assert compiled + loaded == len(plan.buckets)
    note, greedy, streamed = capsys.readouterr().out.splitlines()
    assert "decode step" in note
    assert greedy == "[' a b c d', ' k k k']"
    assert greedy in code  # the comment next to it
    assert streamed.split() == ["h", "e", "y"]


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    folders = re.findall(r"`((?:partinf|models|layouts|experiments|tpu_scripts|tests)/[a-z_/.0-9]*)`", text)
    assert [name for name in links if not (page.parent / name).exists()] == []
    assert [name for name in folders if not (ROOT / name).exists()] == []


def blocks(text: str) -> Iterator[str]:
    """What stands between fences, but for files of other languages."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language in ("", "sh"):
            yield block


def commands(block: str) -> Iterator[list[str]]:
    """The partinf commands in it, without what they are piped into."""
    for line in block.replace("\\\n", " ").splitlines():
        if (line := line.strip().removeprefix("$ ")).startswith("partinf "):
            words = shlex.split(line, comments=True)
            yield words[1 : next((at for at, word in enumerate(words) if word in ("|", "&", ">")), len(words))]


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_has_the_flags_that_it_is_given(page: Path) -> None:
    found = [words for block in blocks(page.read_text()) for words in commands(block)]
    assert found
    for words in found:
        dispatch._parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_opens_with_commands_that_work(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are run one after the other; what would serve is read and planned for, which is all that comes before devices."""
    monkeypatch.chdir(tmp_path)
    if not (ROOT / ".git").exists():
        pytest.skip("launching sends a commit of the checkout, and this is none")
    first = list(commands(next(blocks(page.read_text()))))
    assert first
    for words in first:
        if words[0] != "serve":
            assert main(words) == 0
            continue
        flags = Flags(dispatch._parse(words))
        assert ServedEngine.read(flags).plan(ModelPlace(flags, runs=False)).buckets


def test_the_plan_that_is_shown_is_what_the_command_prints(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = next(one for one in blocks((root / "README.md").read_text()) if one.startswith("$ partinf plan"))
    command, *shown = block.splitlines()
    monkeypatch.setenv("COLUMNS", "120")
    assert main(shlex.split(command)[2:]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = shown[: shown.index("…")]
    assert shown == printed[: len(shown)]


def test_the_recipes_are_there() -> None:
    """One host, four hosts of a slice, Kubernetes and GPUs, each linked from the README."""
    text = (ROOT / "README.md").read_text()
    for page in ("serve-one-host", "serve-v5e-16", "serve-gke", "serve-gpus"):
        assert f"(docs/{page}.md)" in text


@pytest.mark.parametrize("page", sorted((ROOT / "experiments").glob("*/README.md")), ids=lambda page: page.parent.name)
def test_every_experiment_has_its_command_and_ends_with_what_it_means_for_users(page: Path) -> None:
    text = page.read_text()
    assert re.search(rf"^    (?:python (?:-m )?experiments[./]{page.parent.name}|partinf )", text, re.MULTILINE)
    assert re.findall(r"^## .*", text, re.MULTILINE)[-1] == "## For users"


_FIGURE = re.compile(r"\d[\d.,]*\s?(?:%|×|ms\b|µs\b|GB\b|MB\b|GiB\b|times (?:as|the)\b)")


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_every_paragraph_with_a_figure_names_what_made_it(page: Path) -> None:
    """An experiment or a test; figures within fences are the output of the command there."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    paragraphs = prose.split("\n\n")
    for before, paragraph in zip(["", *paragraphs], paragraphs, strict=False):
        if found := _FIGURE.search(paragraph):
            source = before + paragraph if paragraph.startswith("|") else paragraph  # a table may follow the line that names it
            assert re.search(r"experiments/\w+|tests/\w+", source), (found.group(), paragraph)


def test_the_number_of_model_types_is_that_of_the_table_of_families() -> None:
    (count,) = re.findall(r"decoders of (\d+) Hugging Face model types", (ROOT / "README.md").read_text())
    rows = re.findall(r"^\| `([^`]+)` \|[^|]*\| right \|", (ROOT / "docs" / "families.md").read_text(), re.MULTILINE)
    assert int(count) == len(set(rows))
