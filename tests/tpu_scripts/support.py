"""The fake cloud as the tests see it, and a way to run the scripts against it."""

from __future__ import annotations

import ast
import json
import marshal
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    "command": ["bash", "-c", 'echo "$PARTINF_RUN_ID $PARTINF_ATTEMPT" > "$PARTINF_RESULTS/out of it"; echo done'],
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
        (self.folder / "script").write_bytes(marshal.dumps(what))

    @property
    def state(self) -> dict[str, Any]:
        return marshal.loads((self.folder / "state").read_bytes())

    @property
    def calls(self) -> list[list[str]]:
        return [ast.literal_eval(line) for line in (self.folder / "calls").read_text().splitlines()]

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
