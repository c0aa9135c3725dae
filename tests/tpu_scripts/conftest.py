"""A cloud in a folder: the fakes first on PATH, a small git repository to send, and a way to run the scripts against them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent.parent / "tpu_scripts"
sys.path.insert(0, str(SCRIPTS))

GOOD = {
    "name": "my-run",
    "project": "my-project",
    "zone": "us-west4-a",
    "type": "v4-16",
    "time_to_live": "1h",
    "wait": "1m",
    "command": ["bash", "-c", 'echo "$PARTINF_RUN_ID $PARTINF_ATTEMPT" > "$PARTINF_RESULTS/out of it"; echo said'],
    "setup": ["bash", "-c", "echo prepared >> prepared"],
}


def git(folder: Path, *words: str) -> str:
    """Git in a repository of the test's own, whatever the user's configuration says."""
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.com", "-c", "commit.gpgsign=false"]
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def to_toml(table: dict[str, Any]) -> str:
    """JSON values are TOML values here; tables come last."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    tables = [f"[{key}]\n{to_toml(value)}" for key, value in table.items() if isinstance(value, dict)]
    return "\n".join(plain + tables) + "\n"


@dataclass
class FakeCloud:
    """The state of the fake cloud, its script, and the descriptions that are run on it. All of it below a folder with a space."""

    folder: Path
    environment: dict[str, str]
    repository: Path = field(init=False)

    def __post_init__(self) -> None:
        self.repository = self.folder / "a repository"

    def script(self, **what: Any) -> None:
        """What goes wrong; see fake_cloud.py."""
        (self.folder / "script.json").write_text(json.dumps(what))

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "state.json").read_text())

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    def describe(self, **changes: Any) -> Path:
        """A description file: the good one with changes; None leaves a key out."""
        table = {**GOOD, "repository": str(self.repository), **changes}
        file = self.folder / "my description.toml"
        file.write_text(to_toml({key: value for key, value in table.items() if value is not None}))
        return file

    def pod(self, action: str, description: Path, *flags: str) -> int:
        """`pod.py` in this process."""
        import pod

        output = ["--output", str(self.folder / "my results"), "--poll-seconds", "0.01"]
        return pod.main([action, str(description), *output, *flags])

    def pod_process(self, action: str, description: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        """`pod.py` as a program of its own, for what needs signals."""
        command = [sys.executable, str(SCRIPTS / "pod.py"), action, str(description), "--output", str(self.folder / "my results")]
        return subprocess.run(
            [*command, "--poll-seconds", "0.01", *flags], env=self.environment, capture_output=True, text=True, timeout=60
        )

    def result(self, run: str, worker: int, name: str) -> str:
        return (self.folder / "my results" / f"my-run-{run}" / f"worker-{worker}" / name).read_text()


@pytest.fixture(scope="session")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one commit."""
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
    (folder / "state.json").write_text(json.dumps({"machines": {}, "jobsets": {}, "steps": {}, "created": 0}))
    (folder / "calls.jsonl").write_text("")
    fake = FakeCloud(folder, {**os.environ})
    fake.script()
    fake.repository.symlink_to(committed)
    return fake
