"""A cloud in a folder: the fakes first on PATH, and a small git repository to send."""

from __future__ import annotations

import marshal
import os
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from tests.tpu_scripts.support import HERE, FakeCloud, git


@pytest.fixture(scope="session")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one commit."""
    if shutil.which("git") is None:
        pytest.skip("what is sent is a git commit, and there is no git here")
    folder = tmp_path_factory.mktemp("git") / "a repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "a file.txt").write_text("committed\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "one")
    return folder


@pytest.fixture
def cloud(tmp_path: Path, committed: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCloud:
    folder = tmp_path / "a cloud"
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name in ("gcloud", "kubectl"):
        body = f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(HERE)!r})\nimport fake_cloud\nsys.exit(fake_cloud.main())\n"
        (programs / name).write_text(body)
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("FAKE_CLOUD", str(folder))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (folder / "state").write_bytes(marshal.dumps({"machines": {}, "jobsets": {}, "steps": {}, "created": 0}))
    (folder / "calls").touch()
    (folder / "accepted_commands").write_bytes(marshal.dumps(tomllib.loads((HERE / "accepted_commands.toml").read_text())))
    monkeypatch.setattr("pod_deletion.LOOK_SECONDS", 0.2)
    fake = FakeCloud(folder, {**os.environ})
    fake.script()
    fake.repository.symlink_to(committed)
    return fake
