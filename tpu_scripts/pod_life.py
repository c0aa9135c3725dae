"""The life of a machine: create, wait, sync, set up, run, watch, fetch, and whatever happens, delete."""

from __future__ import annotations

import shutil
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pod_checkout import HERE
from pod_commands import PLAN, SOURCE, WORKER_SCRIPT, Command, Done, Gcloud, Runner, archive
from pod_description import Description

COPY_ATTEMPTS = 3
DELETE_ATTEMPTS = 5
UNANSWERED = 10  # polls in a row without an answer, after which a machine that is said to run counts as unreachable
GONE = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING")


class StepFailed(Exception):
    """A step did not work; the machine is deleted and the run has failed."""


class NotOurs(StepFailed):
    """A machine of this name was there before: it belongs to another launch, which will delete it."""


class Preempted(Exception):
    """The capacity was lost; the next attempt may find some."""


@dataclass
class Pod:
    """One run of a description: the steps, each of which raises `StepFailed` or `Preempted`.

    Attributes:
        commit: the full hash that is sent.
        output: the local folder of this run.
        expires: the time, in seconds since 1970, after which nothing of it may exist.
        sleep: waits, and lets an interrupt through.
        poll_seconds: between two looks at the machine.
    """

    description: Description
    gcloud: Gcloud
    runner: Runner
    commit: str
    output: Path
    expires: int
    sleep: Callable[[float], None]
    plan: str | None = None
    poll_seconds: float = 20.0
    now: Callable[[], float] = time.time
    attempt: int = field(default=1)

    def create(self) -> None:
        self.sleep(0)  # an interrupt that has been waiting comes through here, before anything is asked for
        command = self.gcloud.create(self.expires)
        done = self._run(command)
        if done.code and "ALREADY_EXISTS" in done.err:
            raise NotOurs(f"create: {self.gcloud.machine} exists already; take another --run-id, or delete it")
        if done.code:
            raise StepFailed(f"create: {_last(done)}")

    def wait(self) -> None:
        """Until the queued resource is active; no capacity within the deadline counts as lost capacity."""
        deadline, unanswered = self.now() + self.description.wait, 0
        while True:
            done = self._run(self.gcloud.describe())
            state = done.out.strip()
            unanswered = unanswered + 1 if done.code else 0
            if state == "ACTIVE" and not done.code:
                return
            if state in GONE:
                raise Preempted(f"the request became {state}")
            if unanswered >= UNANSWERED:
                raise StepFailed(f"wait: no answer about {self.gcloud.machine}: {_last(done)}")
            if self.now() >= deadline:
                raise Preempted(f"no capacity within {self.description.wait} s (state {state or 'unknown'})")
            self._pause()

    def sync(self) -> None:
        """Send exactly the commit, the script that runs it, and the plan if there is one."""
        if not self.runner.dry:
            self.output.mkdir(parents=True, exist_ok=True)
        source = self.output / SOURCE
        files = [str(source), str(HERE / WORKER_SCRIPT)]
        if self.plan is not None:
            files.append(str(self.output / PLAN))
            if not self.runner.dry:
                (self.output / PLAN).write_text(self.plan)
        self._need("archive", archive(self.description, self.commit, str(source)))
        self._need("copy to the workers", self.gcloud.upload(*files), COPY_ATTEMPTS)

    def setup(self) -> None:
        self._need("setup", self.gcloud.worker("setup", self.commit, *self.description.setup), COPY_ATTEMPTS)

    def start(self) -> None:
        """Start on all workers; safe to repeat, because a run that is already started stays as it is."""
        words = (self.gcloud.run_id, self.commit, str(self.attempt), *self.description.command)
        self._need("start", self.gcloud.worker("start", *words), COPY_ATTEMPTS)

    def watch(self) -> None:
        """Until every worker has ended; a lost connection is only a missing answer, a worker that failed ends the run."""
        unanswered = 0
        while True:
            self._need_machine()
            statuses, last = self.statuses()
            bad = [status for status in statuses if status not in ("running", "exit 0")]
            if bad:
                raise StepFailed(f"run: a worker reports '{bad[0]}'")
            if len(statuses) == self.description.tpu.num_hosts and set(statuses) == {"exit 0"}:
                return
            unanswered = 0 if len(statuses) == self.description.tpu.num_hosts else unanswered + 1
            if unanswered >= UNANSWERED:
                raise StepFailed(f"run: {len(statuses)} of {self.description.tpu.num_hosts} workers answer: {_last(last)}")
            self._pause()

    def statuses(self) -> tuple[list[str], Done]:
        """What each worker that answers says of the run: `running`, `exit N` or `lost`."""
        pretend = "partinf-status exit 0\n" * self.description.tpu.num_hosts
        done = self._run(self.gcloud.worker("status", self.gcloud.run_id, pretend=pretend))
        mark = "partinf-status "
        return [line.removeprefix(mark).strip() for line in done.out.splitlines() if line.startswith(mark)], done

    def fetch(self) -> None:
        """Outputs, exit code and results of every worker, into `output/worker-N/`."""
        self._need("pack", self.gcloud.worker("pack", self.gcloud.run_id), COPY_ATTEMPTS)
        for worker in range(self.description.tpu.num_hosts):
            local = self.output / f"worker-{worker}.tar.gz"
            remote = f"partinf-pod/{self.gcloud.run_id}.tar.gz"
            self._need(f"fetch from worker {worker}", self.gcloud.download(remote, str(local), worker), COPY_ATTEMPTS)
            if not self.runner.dry:
                self._unpack(local, self.output / f"worker-{worker}")

    def delete(self) -> bool:
        """Delete the machine; True when it is gone."""
        for number in range(DELETE_ATTEMPTS):
            done = self._run(self.gcloud.delete())
            if not done.code or "NOT_FOUND" in done.err:
                return True
            _say(f"deleting failed ({number + 1} of {DELETE_ATTEMPTS}): {_last(done)}")
            time.sleep(self.poll_seconds)  # not self.sleep: nothing may cut this short
        _say(f"MACHINE MAY STILL EXIST AND COST MONEY. Delete it yourself: {self.gcloud.delete()}")
        return False

    def _run(self, command: Command) -> Done:
        """No command but those that create and delete may take longer than there is time to live."""
        if not command.shielded:
            command = replace(command, timeout=min(command.timeout, max(1.0, self.expires - self.now())))
        return self.runner.run(command)

    def _need(self, step: str, command: Command, attempts: int = 1) -> Done:
        for number in range(attempts):
            if number:
                self._need_machine()
                self.sleep(self.poll_seconds)
            done = self._run(command)
            if not done.code:
                return done
            _say(f"{step} failed ({number + 1} of {attempts}): {_last(done)}")
        if attempts > 1:
            self._need_machine()
        raise StepFailed(f"{step}: {_last(done)}")

    def _need_machine(self) -> None:
        """Tell lost capacity and the end of the time to live from an ordinary failure."""
        if self.now() >= self.expires:
            raise StepFailed(f"the time to live of {self.description.time_to_live} s is over")
        done = self._run(self.gcloud.describe())
        if done.out.strip() in GONE or "NOT_FOUND" in done.err:
            raise Preempted(f"the machine is {done.out.strip() or 'gone'}")

    def _pause(self) -> None:
        if self.now() >= self.expires:
            raise StepFailed(f"the time to live of {self.description.time_to_live} s is over")
        self.sleep(self.poll_seconds)

    @staticmethod
    def _unpack(file: Path, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with tarfile.open(file) as packed:
                for member in packed.getmembers():
                    member.name = member.name.partition("/")[2] or "."
                packed.extractall(folder, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise StepFailed(f"fetch: {file.name} cannot be unpacked: {error}") from None
        file.unlink()


def launch(pod: Pod) -> int:
    """Everything from creating to deleting, with further attempts after lost capacity; 0 when every worker ended well.

    Raises:
        Interrupted: after the machine was deleted.
    """
    for attempt in range(1, pod.description.retries + 2):
        pod.attempt = attempt
        try:
            return _attempt(pod)
        except Preempted as reason:
            _say(f"attempt {attempt} of {pod.description.retries + 1}: {reason}")
        except StepFailed as failure:
            _say(str(failure))
            return 1
        if pod.now() >= pod.expires:
            _say("the time to live is over")
            return 1
    _say("no attempts left")
    return 1


def _attempt(pod: Pod) -> int:
    ours, deleted = True, False
    try:
        pod.create()
        pod.wait()
        pod.sync()
        pod.setup()
        pod.start()
        try:
            pod.watch()
        except StepFailed:
            _try_to_fetch(pod)
            raise
        pod.fetch()
    except NotOurs:
        ours = False
        raise
    finally:
        # No interrupt is let through in here (see Signals): one before it has ended the steps above, one during it changes nothing.
        if ours:
            deleted = pod.delete()
    return 0 if deleted else 1


def _try_to_fetch(pod: Pod) -> None:
    """What a failed run left behind helps to see why; that it cannot be fetched must not hide the failure."""
    try:
        pod.fetch()
    except (StepFailed, Preempted) as reason:
        _say(f"the outputs of the failed run are lost: {reason}")


def _say(line: str) -> None:
    print(f"pod: {line}", file=sys.stderr, flush=True)


def _last(done: Done) -> str:
    """The last line that a command wrote to stderr, else to stdout."""
    lines = [line.strip() for line in (done.err or done.out).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.code}"
