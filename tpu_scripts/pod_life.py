"""The life of a machine: create, wait, sync, set up, run, watch, fetch, and whatever happens, delete."""

from __future__ import annotations

import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pod_checkout import HERE
from pod_commands import SOURCE, WORKER_SCRIPT, Command, Done, Gcloud, Runner, archive
from pod_deletion import Deletion, say
from pod_description import PLAN, Description
from pod_failures import EXISTS, Left, classify, classify_text, reason, unreachable

COPY_ATTEMPTS = 3
UNANSWERED = 10  # polls in a row without an answer, after which a machine that is reported to run counts as unreachable
GONE = {
    "SUSPENDING": "its capacity is being taken away",
    "SUSPENDED": "its capacity was taken away",
    "FAILED": "",  # the machine itself says why
    "DELETING": "something else deletes it: reap, the console or another command",
}

_SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python has it from 3.11.4 on


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
        rest: waits, and nothing cuts it short.
        requested: whether this run has requested a machine that may exist.
        awaited: whether that machine was neither seen nor refused, so that it may still come into being.
        made: whether it ever may have existed, in any attempt.
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
    rest: Callable[[float], None] = time.sleep
    requested: bool = field(default=False, init=False)
    awaited: bool = field(default=False, init=False)
    made: bool = field(default=False, init=False)

    def create(self) -> None:
        self.sleep(0)  # an interrupt that has been waiting comes through here, before anything is requested
        own = self.made  # then a machine of this name is the one before
        self.requested = self.awaited = self.made = True
        done = self._run(self.gcloud.create(self.expires))
        if not done.code:
            return
        failure = classify(done)
        if failure is EXISTS and own:
            raise Preempted(f"the machine before is still there: {reason(done)}")
        self.requested, self.awaited = failure.left is not Left.NOTHING, failure.left is Left.UNCLEAR
        self.made = own or self.requested
        if failure is EXISTS:
            raise NotOurs(f"create: {self.gcloud.machine} exists already; take another --run-id, or delete it: {self.gcloud.delete()}")
        raise (Preempted if failure.again else StepFailed)(f"create: {reason(done)}")

    def wait(self) -> None:
        """Until the queued resource is active; no capacity within the deadline counts as lost capacity."""
        deadline, unanswered = self.now() + self.description.wait, 0
        while True:
            done = self._run(self.gcloud.describe())
            state = self._state_of(done)
            unanswered = unanswered + 1 if done.code else 0
            if state == "ACTIVE":
                return
            self._raise_if_gone(state)
            if unanswered >= UNANSWERED:
                raise StepFailed(f"wait: no answer about {self.gcloud.machine}: {reason(done)}")
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
        self._need("copy to the workers", self.gcloud.upload(*files), COPY_ATTEMPTS, Preempted)

    def setup(self) -> None:
        self._need("setup", self.gcloud.worker("setup", self.commit, *self.description.setup), COPY_ATTEMPTS, Preempted)

    def start(self) -> None:
        """Start on all workers; safe to repeat, because a run that is already started stays as it is."""
        words = (self.gcloud.run_id, self.commit, str(self.attempt), *self.description.command)
        self._need("start", self.gcloud.worker("start", *words), COPY_ATTEMPTS, Preempted)

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
                raise StepFailed(f"run: {len(statuses)} of {self.description.tpu.num_hosts} workers answer: {reason(last)}")
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
        """Delete the machine; True when it is gone, and will not come if this run has requested it."""
        state = lambda: self._state_of(self._run(self.gcloud.describe()))  # noqa: E731
        command = self.gcloud.delete()
        deletion = Deletion("MACHINE", self.gcloud.machine, command, self.runner, self.poll_seconds, self.now, self.rest, state)
        gone = deletion.until_gone(self.awaited)
        self.requested = self.awaited = not gone
        return gone

    def _run(self, command: Command) -> Done:
        """No command but those that create and delete may take longer than there is time to live."""
        if not command.shielded:
            command = replace(command, timeout=min(command.timeout, max(1.0, self.expires - self.now())))
        return self.runner.run(command)

    def _need(self, step: str, command: Command, attempts: int = 1, out_of_reach: type[Exception] = StepFailed) -> Done:
        """Run until it works: `attempts` times, or where ssh does not reach a worker, `UNANSWERED` times and then `out_of_reach`."""
        number = 0
        while True:
            done = self._run(command)
            if not done.code:
                return done
            number += 1
            silent = attempts > 1 and unreachable(done)
            limit = UNANSWERED if silent else attempts
            say(f"{step} failed ({number} of {limit}): {reason(done)}")
            if attempts > 1:
                self._need_machine()
            if number >= limit:
                raise (out_of_reach if silent else StepFailed)(f"{step}: {reason(done)}")
            self.sleep(self.poll_seconds)

    def _need_machine(self) -> None:
        """Tell lost capacity and the end of the time to live from an ordinary failure."""
        if self.now() >= self.expires:
            raise StepFailed(f"the time to live of {self.description.time_to_live} s is over")
        done = self._run(self.gcloud.describe())
        self._raise_if_gone(self._state_of(done))
        if "NOT_FOUND" in done.err:
            raise Preempted("the machine is gone")

    def _state_of(self, done: Done) -> str:
        """The state in an answer of `describe`, which also shows that the machine has come into being."""
        if not done.code:
            self.awaited = False
        return "" if done.code else done.out.strip()

    def _raise_if_gone(self, state: str) -> None:
        if state not in GONE:
            return
        why = GONE[state]
        if state == "FAILED":
            done = self._run(self.gcloud.describe_failure())
            why = reason(done) if done.code else done.out.strip().removeprefix(state)
        # A reason in the table that no waiting changes ends the run; everything else is lost capacity.
        lost = state != "FAILED" or not why or classify_text(why).again or classify_text(why).left is Left.UNCLEAR
        raise (Preempted if lost else StepFailed)(f"the machine is {state}{f': {why}' if why else ''}")

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
                    if PurePosixPath(member.name).is_absolute() or ".." in PurePosixPath(member.name).parts:
                        raise StepFailed(f"fetch: {file.name} has a file outside its folder: {member.name}")
                packed.extractall(folder, **_SAFELY)
        except (OSError, tarfile.TarError) as error:
            raise StepFailed(f"fetch: {file.name} cannot be unpacked: {error}") from None
        file.unlink()


def launch(pod: Pod) -> int:
    """Everything from creating to deleting, with further attempts after lost capacity; 0 when every worker ended well.

    Raises:
        Interrupted: after the machine was deleted.
    """
    attempts = pod.description.retries + 1
    for attempt in range(1, attempts + 1):
        pod.attempt = attempt
        try:
            return _attempt(pod)
        except Preempted as lost:
            say(f"attempt {attempt} of {attempts}: {lost}")
        except StepFailed as failure:
            say(str(failure))
            return 1
        if pod.now() >= pod.expires:
            say("the time to live is over")
            return 1
        if attempt < attempts:
            pod.sleep(min(pod.poll_seconds * 2 ** (attempt - 1), max(0.0, pod.expires - pod.now())))
    say("no attempts left")
    return 1


def create(pod: Pod) -> None:
    """The step alone: the machine stays, unless creating fails or is interrupted."""
    created = False
    try:
        pod.create()
        pod.sleep(0)
        created = True
    finally:
        if pod.requested and not created:
            pod.delete()


def _attempt(pod: Pod) -> int:
    deleted = True
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
    finally:
        # No interrupt is let through in here (see Signals): one before it has ended the steps above, one during it changes nothing.
        if pod.requested:
            deleted = pod.delete()
    return 0 if deleted else 1


def _try_to_fetch(pod: Pod) -> None:
    """What a failed run left behind helps to see why; that it cannot be fetched must not hide the failure."""
    try:
        pod.fetch()
    except (StepFailed, Preempted) as failure:
        say(f"the outputs of the failed run are lost: {failure}")
