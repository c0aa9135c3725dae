"""The exact gcloud, kubectl and git commands of a run, and the two ways to treat them: execute, or record for a dry run.

Everything that creates, sends, runs or deletes goes through `Runner.run`, so a dry run takes the same path as a real one; a recorder
answers with the output that a command has when all goes well.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pod_description import Description

WORKER_SCRIPT = "partinf_worker.sh"
SOURCE = "partinf-source.tar.gz"
RUN_LABEL = "partinf-run"
EXPIRES_LABEL = "partinf-expires"


@dataclass(frozen=True)
class Command:
    """One command line. `pretend` is what a recorder answers; `shielded` ones are not cut short by an interrupt."""

    argv: tuple[str, ...]
    pretend: str = ""
    shielded: bool = False
    timeout: float = 3600.0

    def __str__(self) -> str:
        return shlex.join(self.argv)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived: stop what is running, delete, leave."""


class Runner(Protocol):
    """Runs commands, or says that it would."""

    dry: bool

    def run(self, command: Command) -> Done: ...


@dataclass
class Recorder:
    """Prints every command to stdout and answers as if it had worked."""

    dry: bool = True
    commands: list[str] = field(default_factory=list)

    def run(self, command: Command) -> Done:
        self.commands.append(str(command))
        print(command, flush=True)
        return Done(0, command.pretend, "")


@dataclass
class Executor:
    """Runs every command in a session of its own, so that a Ctrl-C in the terminal reaches this program and not the command."""

    signals: Signals
    dry: bool = False

    def run(self, command: Command) -> Done:
        print(f"+ {command}", file=sys.stderr, flush=True)
        with contextlib.nullcontext() if command.shielded else self.signals.interruptible():
            return _execute(command)


def _execute(command: Command) -> Done:
    try:
        process = subprocess.Popen(
            command.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Done(127, "", f"{command.argv[0]}: {error.strerror}; is it installed and on PATH?")
    try:
        out, err = process.communicate(timeout=command.timeout)
    except subprocess.TimeoutExpired:
        _kill(process)
        return Done(124, "", f"no answer after {command.timeout:.0f} s")
    except BaseException:
        _kill(process)
        raise
    return Done(process.returncode, out, err)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a command and whatever it started; `start_new_session` made it the leader of a group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


class Signals:
    """Turns SIGINT, SIGTERM and SIGHUP into `Interrupted`, but only inside `interruptible`: everywhere else they wait.

    So there is no instant at which an interrupt can come between a machine and its deletion.
    """

    def __init__(self) -> None:
        self._open = False
        self._pending = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Install the handlers and put the former ones back."""
        kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {kind: signal.signal(kind, self._on_signal) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let an interrupt, also one that has been waiting, raise `Interrupted` here."""
        self._open = True
        try:
            if self._pending:
                self._pending = False
                raise Interrupted
            yield
        finally:
            self._open = False

    def sleep(self, seconds: float) -> None:
        """Wait, unless interrupted."""
        with self.interruptible():
            time.sleep(seconds)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._open:
            self._open = False
            raise Interrupted
        self._pending = True
        print("pod: interrupted; finishing what must not be left half done", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Gcloud:
    """The gcloud commands of one run. The queued resource and its node carry the run id in their name, so they are this run's own."""

    description: Description
    run_id: str

    @property
    def machine(self) -> str:
        return f"{self.description.name}-{self.run_id}"

    def create(self, expires: int) -> Command:
        d = self.description
        shape = [f"--accelerator-type={d.tpu.name}"]
        if not d.tpu.default_topology:
            shape = [f"--type={d.tpu.cloud.prefix}", f"--topology={d.tpu.topology}"]
        labels = f"--labels={RUN_LABEL}={self.run_id},{EXPIRES_LABEL}={expires}"
        until = f"--valid-until-duration={d.wait}s"
        flags = [f"--node-id={self.machine}", *shape, f"--runtime-version={d.runtime}", labels, until, "--async"]
        return self._queued("create", *flags, *(["--spot"] if d.spot else []), shielded=True, timeout=300)

    def describe(self) -> Command:
        return self._queued("describe", "--format=value(state.state)", pretend="ACTIVE\n", timeout=120)

    def describe_failure(self) -> Command:
        """Why a queued resource failed."""
        return self._queued("describe", "--format=value(state.failedData.error.message)", timeout=120)

    def delete(self) -> Command:
        return self._queued("delete", "--force", shielded=True, timeout=900)

    def upload(self, *files: str) -> Command:
        return self._vm("scp", *files, f"{self.machine}:", "--worker=all")

    def download(self, remote: str, local: str, worker: int) -> Command:
        return self._vm("scp", f"{self.machine}:{remote}", local, f"--worker={worker}")

    def ssh(self, words: Sequence[str], worker: int | None = None, pretend: str = "") -> Command:
        """One shell line on one worker, or on all."""
        where = "all" if worker is None else str(worker)
        return self._vm("ssh", self.machine, f"--worker={where}", f"--command={shlex.join(words)}", pretend=pretend)

    def worker(self, action: str, *words: str, worker: int | None = None, pretend: str = "") -> Command:
        return self.ssh(["bash", WORKER_SCRIPT, action, *words], worker, pretend)

    def _queued(self, verb: str, *flags: str, pretend: str = "", shielded: bool = False, timeout: float = 600) -> Command:
        words = ("gcloud", "compute", "tpus", "queued-resources", verb, self.machine, *_where(self.description), *flags, "--quiet")
        return Command(words, pretend, shielded, timeout)

    def _vm(self, verb: str, *words: str, pretend: str = "") -> Command:
        return Command(("gcloud", "compute", "tpus", "tpu-vm", verb, *words, *_where(self.description), "--quiet"), pretend)


def list_machines(description: Description) -> Command:
    """All queued resources of the description's project and zone, as JSON."""
    words = ("gcloud", "compute", "tpus", "queued-resources", "list", *_where(description), "--format=json", "--quiet")
    return Command(words, pretend="[]")


def delete_machine(description: Description, machine: str) -> Command:
    """Delete a queued resource and its nodes by name."""
    words = ("gcloud", "compute", "tpus", "queued-resources", "delete", machine, *_where(description), "--force", "--quiet")
    return Command(words, shielded=True, timeout=900)


def _where(description: Description) -> tuple[str, str]:
    return (f"--project={description.project}", f"--zone={description.zone}")


def archive(description: Description, commit: str, target: str) -> Command:
    """Exactly one commit of the checkout as an archive."""
    return Command(("git", "-C", str(description.repository), "archive", "--format=tar.gz", f"--output={target}", commit))
