"""What a failure means: which requests are repeated, and that nothing is left that came after all, and nothing deleted that never was."""

from __future__ import annotations

import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.tpu_scripts.support import HERE  # noqa: F401  # makes the scripts importable

# isort: split
import pod_commands
import pod_deletion
import pod_jobset
from pod_commands import Command, Done, Gcloud, Interrupted
from pod_description import Description, read_description
from pod_failures import Left, classify, classify_text, reason, unreachable
from pod_life import NotOurs, Pod, Preempted, StepFailed, create, launch

from tests.tpu_scripts.support import GOOD, to_toml

NO_LOGIN = """ERROR: (gcloud.compute.tpus.queued-resources.create) You do not currently have an active account selected.
Please run:

  $ gcloud auth login

to obtain new credentials.
"""
MISSING = Done(1, "", "ERROR: (gcloud) NOT_FOUND: no such queued resource")


@dataclass
class Clock:
    """Time that passes only during waits."""

    time: float = 1000.0

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.time += seconds


@dataclass
class Cloud:
    """One queued resource: `created` is what asking for it answers, and it is there `delay` seconds after that, or never."""

    clock: Clock
    created: Done
    delay: float | None = 0.0
    interrupt: bool = False
    dry: bool = False
    verbs: list[str] = field(default_factory=list)
    due: float | None = None
    deleted: int = 0

    def run(self, command: Command) -> Done:
        verb = command.argv[4]
        self.verbs.append(verb)
        if verb == "create":
            self.due = None if self.delay is None else self.clock.now() + self.delay
            if self.interrupt:
                raise Interrupted
            return self.created
        if self.due is None or self.clock.now() < self.due:
            return MISSING
        if verb == "delete":
            self.due, self.deleted = None, self.deleted + 1
        return Done(0, "WAITING_FOR_RESOURCES\n", "")


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(pod_deletion, "LOOK_SECONDS", 45.0)
    return 45.0


def description(**changes: object) -> Description:
    return read_description(to_toml({**GOOD, "retries": 0, **changes}), "test", Path())


def pod_of(cloud: Cloud, **changes: object) -> Pod:
    here = description(**changes)
    clock = cloud.clock
    return Pod(here, Gcloud(here, "r1"), cloud, "commit", Path("nowhere"), 10**6, clock.wait, None, 1.0, clock.now, rest=clock.wait)


UNCLEAR = [
    Done(124, "", "no answer after 300 s"),
    Done(1, "", "ERROR: (gcloud) INTERNAL: the answer was lost"),
    Done(1, "", "what?"),
    Done(-9, "", ""),
]


@pytest.mark.parametrize("answer", UNCLEAR)
@pytest.mark.parametrize("delay", [0.0, 3.0, 40.0])
@pytest.mark.parametrize("action", [launch, create])
def test_a_machine_that_appears_after_it_was_given_up_is_deleted(answer: Done, delay: float, action, capsys) -> None:
    cloud = Cloud(Clock(), answer, delay)
    if action is launch:
        assert launch(pod_of(cloud)) == 1
    else:
        with pytest.raises(StepFailed):
            create(pod_of(cloud))
    assert (cloud.deleted, cloud.due) == (1, None)
    assert ("came after all and is deleted" in capsys.readouterr().err) == (delay > 0)


@pytest.mark.parametrize("action", [launch, create])
def test_an_interrupt_while_creating_waits_for_what_may_come(action) -> None:
    cloud = Cloud(Clock(), Done(0, "", ""), 3.0, interrupt=True)
    with pytest.raises(Interrupted):
        action(pod_of(cloud))
    assert (cloud.deleted, cloud.due) == (1, None)


def test_an_interrupt_right_after_creating_deletes_what_the_step_alone_has_made() -> None:
    cloud = Cloud(Clock(), Done(0, "", ""), 3.0)
    pod, waits = pod_of(cloud), [0]

    def interrupted(seconds: float) -> None:
        waits[0] += 1
        if waits[0] == 2:
            raise Interrupted

    pod.sleep = interrupted
    with pytest.raises(Interrupted):
        create(pod)
    assert cloud.deleted == 1


@pytest.mark.parametrize("answer", UNCLEAR)
def test_looking_ends_at_a_bound_and_says_in_one_line_how_to_check(answer: Done, bound: float, capsys) -> None:
    cloud = Cloud(Clock(), answer, None)
    assert launch(pod_of(cloud)) == 1
    assert bound <= cloud.clock.now() - 1000 <= bound + 2
    printed = [line for line in capsys.readouterr().err.splitlines() if "MAY STILL COME" in line]
    assert len(printed) == 1
    assert "gcloud compute tpus queued-resources delete my-run-r1 --project=my-project --zone=us-west4-a --force --quiet" in printed[0]


def test_what_was_seen_is_gone_when_it_is_not_found(bound: float) -> None:
    """The capacity was lost, and the resource with it: nothing is left to look for."""
    cloud = Cloud(Clock(), Done(0, "", ""))
    pod = pod_of(cloud, wait="1s")
    pod.create()
    with pytest.raises(Preempted):
        pod.wait()
    cloud.due = None
    before = cloud.clock.now()
    assert pod.delete()
    assert cloud.clock.now() == before


NEVER = [
    (Done(1, "", NO_LOGIN), "You do not currently have an active account selected. Please run: $ gcloud auth login"),
    (Done(1, "", "ERROR: (gcloud) There was a problem refreshing your current auth tokens: Reauthentication failed."), "Reauthentication"),
    (Done(1, "", "ERROR: (gcloud) UNAUTHENTICATED: Request had invalid authentication credentials."), "UNAUTHENTICATED"),
    (Done(1, "", "ERROR: (gcloud) The project property must be set to a valid project ID, [x] is not."), "project property"),
    (Done(1, "", "ERROR: (gcloud) PERMISSION_DENIED: Cloud TPU API has not been used in project 7 before or it is disabled."), "TPU API"),
    (Done(2, "", "ERROR: (gcloud) unrecognized arguments: --x"), "--x"),
    (Done(1, "", "ERROR: (gcloud) INVALID_ARGUMENT: no such runtime version"), "runtime version"),
    (Done(127, "", "gcloud: No such file or directory; is it installed and on PATH?"), "is it installed"),
]


@pytest.mark.parametrize(("answer", "printed"), NEVER)
def test_a_request_that_was_never_made_is_reported_at_once_and_nothing_deleted(answer: Done, printed: str, capsys) -> None:
    cloud = Cloud(Clock(), answer, None)
    assert launch(pod_of(cloud, retries=2)) == 1
    assert cloud.verbs == ["create"]
    assert cloud.clock.now() == 1000
    (line,) = capsys.readouterr().err.splitlines()
    assert printed in line


REFUSED = {
    'There is no more capacity in the zone "us-west4-a"; you can try in another zone': ("capacity", True),
    "RESOURCE_EXHAUSTED: the zone does not have enough resources available": ("capacity", True),
    "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS": ("capacity", True),
    "Stockout in us-west4-a": ("capacity", True),
    "Insufficient reserved capacity": ("capacity", True),
    "RESOURCE_EXHAUSTED: Quota limit 'TPUV4' has been exceeded. Limit: 0 in zone us-west4-a.": ("quota", False),
    "RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Requests' and limit 'Requests per minute'": ("rate", True),
    "HttpError 429: Too Many Requests": ("rate", True),
    "UNAVAILABLE: the service is currently unavailable": ("unavailable", True),
    "HTTPError 503: backend error": ("unavailable", True),
    "An internal error has occurred. Please try again": ("unavailable", True),
    "INTERNAL: an internal error": ("internal", False),
    "DEADLINE_EXCEEDED": ("internal", False),
    "PERMISSION_DENIED: Permission denied on 'locations/us-west4-a' (or it may not exist)": ("project", False),
    "INVALID_ARGUMENT: no such accelerator type": ("request", False),
    "something new": ("unknown", False),
}


@pytest.mark.parametrize("text", REFUSED)
def test_one_table_says_what_may_succeed_later(text: str) -> None:
    failure = classify(Done(1, "", f"ERROR: (gcloud.compute.tpus.queued-resources.create) {text}"))
    assert (failure.name, failure.again) == REFUSED[text]
    cloud = Cloud(Clock(), Done(1, "", text), None)
    assert launch(pod_of(cloud, retries=2)) == 1
    assert cloud.verbs.count("create") == (3 if failure.again else 1)
    assert ("delete" in cloud.verbs) == (failure.left is not Left.NOTHING)


def test_names_and_numbers_are_not_taken_for_codes() -> None:
    assert classify_text("INVALID_ARGUMENT: my-run-429") is classify_text("INVALID_ARGUMENT: x")
    assert classify_text("what is my-run-503").name == "unknown"


def test_attempts_after_a_refusal_come_at_growing_distance() -> None:
    cloud = Cloud(Clock(), Done(1, "", "There is no more capacity in the zone"), None)
    assert launch(pod_of(cloud, retries=3)) == 1
    assert cloud.clock.now() == 1000 + 1 + 2 + 4


def test_the_machine_of_the_attempt_before_is_recognised() -> None:
    cloud = Cloud(Clock(), Done(1, "", "There is no more capacity in the zone"), None)
    pod = pod_of(cloud)
    with pytest.raises(Preempted):
        pod.create()
    assert pod.delete()
    cloud.created, cloud.delay = Done(1, "", "ALREADY_EXISTS: my-run-r1"), 0.0
    with pytest.raises(Preempted):
        pod.create()
    assert pod.delete()
    assert cloud.deleted == 1
    other = pod_of(cloud)
    with pytest.raises(NotOurs, match="queued-resources delete my-run-r1"):
        other.create()
    assert not other.requested


def test_the_error_is_reported_and_not_the_last_line_of_advice() -> None:
    assert reason(Done(1, "", "warning\nERROR: (gcloud) no\n\nhint\n")) == "ERROR: (gcloud) no hint"
    assert reason(Done(1, "out\n", "")) == "out"
    assert reason(Done(3, "", "")) == "exit code 3"
    refused = "ssh: connect to host 1.2.3.4 port 22: Connection refused"
    failed = Done(255, "", f"{refused}\nERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].\n")
    assert refused in reason(failed)
    assert unreachable(failed)
    assert not unreachable(Done(1, "", "pip: Connection refused"))


# The same against the fake programs.


def test_a_request_that_is_killed_and_accepted_leaves_no_machine(cloud, monkeypatch, capsys) -> None:
    execute = pod_commands._execute

    def killed(command: Command) -> Done:
        done = execute(command)
        return Done(124, "", f"no answer after {command.timeout:.0f} s") if "create" in command.argv else done

    monkeypatch.setattr(pod_commands, "_execute", killed)
    monkeypatch.setattr(pod_deletion, "LOOK_SECONDS", 60.0)  # it ends when the machine is found
    cloud.script(appears=3)
    assert cloud.pod("launch", cloud.describe(), "--run-id", "r1") == 1
    assert (cloud.state["created"], cloud.state["machines"]) == (1, {})
    assert "came after all" in capsys.readouterr().err


def test_a_refusal_for_want_of_capacity_is_repeated(cloud) -> None:
    cloud.script(fail={"create": 2}, reasons={"create": ("There is no more capacity in the zone", 1)}, hosts=1)
    assert cloud.pod("launch", cloud.describe(type="v4-8"), "--run-id", "r1") == 0
    assert cloud.state["steps"]["create"] == 3
    assert cloud.state["machines"] == {}


def test_without_a_login_launch_says_so_at_once_and_deletes_nothing(cloud, capsys) -> None:
    cloud.script(fail=dict.fromkeys(("create", "delete", "describe"), 1000), reasons={"create": (NO_LOGIN, 1), "delete": (NO_LOGIN, 1)})
    assert cloud.pod("launch", cloud.describe(), "--run-id", "r1") == 1
    assert [call[4] for call in cloud.calls] == ["create"]
    printed = capsys.readouterr().err
    assert "gcloud auth login" in printed
    assert "MAY STILL" not in printed


@pytest.mark.parametrize("step", ["upload", "setup"])
def test_a_worker_that_is_not_reached_yet_is_tried_again(cloud, step: str) -> None:
    cloud.script(fail={step: 6}, reasons={step: ("ssh: connect to host port 22: Connection refused", 255)}, hosts=1)
    assert cloud.pod("launch", cloud.describe(type="v4-8"), "--run-id", "r1") == 0
    assert (cloud.state["steps"][step], cloud.state["created"], cloud.state["machines"]) == (7, 1, {})


def test_a_worker_that_is_never_reached_is_lost_capacity(cloud) -> None:
    cloud.script(fail={"upload": 10}, reasons={"upload": ("ssh: connect to host port 22: Connection timed out", 255)}, hosts=1)
    assert cloud.pod("launch", cloud.describe(type="v4-8"), "--run-id", "r1") == 0
    assert (cloud.state["steps"]["upload"], cloud.state["created"], cloud.state["machines"]) == (11, 2, {})


@pytest.mark.parametrize(
    ("why", "created"), [("There is no more capacity in the zone", 2), ("Quota limit 'TPUV4' has been exceeded", 1), ("", 2)]
)
def test_why_a_request_failed_is_reported_and_decides_whether_it_is_made_again(cloud, capsys, why: str, created: int) -> None:
    cloud.script(states=["FAILED"], why=why, hosts=1)
    assert cloud.pod("launch", cloud.describe(type="v4-8", retries=1), "--run-id", "r1") == 1
    assert cloud.state["created"] == created
    assert f"the machine is FAILED{': ' + why if why else ''}" in capsys.readouterr().err


def test_a_machine_that_something_else_deletes_is_reported(cloud, capsys) -> None:
    cloud.script(states=["DELETING"], hosts=1)
    assert cloud.pod("launch", cloud.describe(type="v4-8", retries=0), "--run-id", "r1") == 1
    assert "the machine is DELETING: something else deletes it" in capsys.readouterr().err


def test_a_machine_that_cannot_be_deleted_is_reported_with_its_state(cloud, capsys) -> None:
    assert cloud.pod("create", cloud.describe(), "--run-id", "r1") == 0
    cloud.script(fail={"delete": 1000})
    assert cloud.pod("delete", cloud.describe(), "--run-id", "r1") == 1
    assert "MAY STILL EXIST AND COST MONEY (it is ACTIVE)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("printed", "verbs"),
    [
        ("error: You must be logged in to the server (Unauthorized)", ["apply"]),
        ('error: context "my-cluster" does not exist', ["apply"]),
        ("Error from server (Timeout): the server was unable to answer", ["apply", "delete"]),
    ],
)
def test_a_jobset_that_was_never_sent_is_not_deleted_and_one_that_may_come_is_looked_for(
    printed: str, verbs: list[str], tmp_path, monkeypatch
) -> None:
    clock, requested = Clock(), []

    class Cluster:
        dry = False

        def run(self, command: Command) -> Done:
            requested.append(command.argv[3])
            if "apply" in command.argv:
                return Done(1, "", printed)
            return Done(0, "", "") if clock.now() >= 1003 else Done(1, "", 'Error from server (NotFound): jobsets "my-run-r1" not found')

    monkeypatch.setattr(pod_deletion.time, "sleep", clock.wait)
    gke = {"image": "an/image:1", "context": "my-cluster"}
    deletion = pod_deletion.Deletion
    monkeypatch.setattr(pod_jobset, "Deletion", lambda *rest: deletion(*rest, now=clock.now, rest=clock.wait))
    assert pod_jobset.run_jobset(description(gke=gke), "r1", Cluster(), None, tmp_path, 1.0, now=clock.now) == 1
    assert list(dict.fromkeys(requested)) == verbs
    assert requested.count("delete") == (4 if "delete" in verbs else 0)


def test_these_tests_do_not_wait() -> None:
    started = time.monotonic()
    launch(pod_of(Cloud(Clock(), UNCLEAR[0], 40.0)))
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("name", ["r1/../../outside", "r1//outside"])
def test_an_archive_with_a_file_outside_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    file, folder = tmp_path / "worker-0.tar.gz", tmp_path / "inner" / "worker-0"
    with tarfile.open(file, "w:gz") as packed:
        packed.addfile(tarfile.TarInfo(name))
    with pytest.raises(StepFailed, match="outside its folder"):
        Pod._unpack(file, folder)
    assert not (tmp_path / "outside").exists()
