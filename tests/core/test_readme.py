"""The README's ten lines of library use do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_the_library_example_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    note, greedy, streamed = capsys.readouterr().out.splitlines()
    assert "decode step" in note
    assert greedy == "[' a b c d', ' k k k']"
    assert greedy in code  # the comment beside it
    assert streamed.split() == ["h", "e", "y"]


def test_every_file_that_the_readme_names_exists(root: Path) -> None:
    text = (root / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    folders = re.findall(r"`((?:partinf|models|layouts|experiments|tpu_scripts)/[a-z_/.0-9]*)`", text)
    assert len(links) + len(folders) > 8
    assert [name for name in links + folders if not (root / name).exists()] == []
