"""A machine's life on the fake cloud: whatever fails, is lost or is interrupted, what was created is deleted."""

from __future__ import annotations

import io
import re
import shlex
import time

import pytest

STEPS = ("create", "describe", "upload", "setup", "start", "status", "pack", "download", "delete")


def test_a_run_creates_runs_fetches_and_deletes(cloud) -> None:
    """Also: names with spaces survive, in the folders, in the results and in the command."""
    cloud.script(states=["WAITING_FOR_RESOURCES", "PROVISIONING"])
    words = ["bash", "-c", 'cp "$1" "$PARTINF_RESULTS/"; cat prepared; echo "$2"', "-", "a file.txt", 'it\'s "quoted"  twice']
    assert cloud.pod("launch", cloud.describe(command=words), "--run-id", "r1") == 0
    for worker in range(2):
        assert cloud.result("r1", worker, "results/a file.txt") == "committed\n"
        assert cloud.result("r1", worker, "stdout") == 'prepared\nit\'s "quoted"  twice\n'
        assert cloud.result("r1", worker, "exit_code") == "0\n"
    assert cloud.state["created"] == 1
    assert cloud.state["machines"] == {}


def test_steps_that_may_be_repeated_are(cloud) -> None:
    """Each of them fails once: copies, commands on workers, questions, and deleting."""
    cloud.script(fail={step: 1 for step in STEPS if step != "create"})
    assert cloud.pod("launch", cloud.describe(), "--run-id", "r1") == 0
    assert cloud.result("r1", 1, "stdout") == "done\n"
    assert cloud.state["machines"] == {}


@pytest.mark.parametrize("step", [step for step in STEPS if step != "delete"])
def test_a_step_that_always_fails_is_given_up_and_leaves_no_machine(cloud, step: str) -> None:
    cloud.script(fail={step: 1000}, hosts=1)
    assert cloud.pod("launch", cloud.describe(type="v4-8"), "--run-id", "r1") == 1
    assert cloud.state["machines"] == {}
    assert cloud.state["steps"][step] == {"create": 1, "describe": 10, "status": 10}.get(step, 3)


def test_a_machine_that_was_created_although_creating_failed_is_deleted(cloud) -> None:
    cloud.script(fail={"create": "late"})
    assert cloud.pod("launch", cloud.describe(), "--run-id", "r1") == 1
    assert cloud.state["created"] == 1
    assert cloud.state["machines"] == {}


def test_deleting_that_always_fails_is_reported_with_the_command_to_type(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.script(fail={"delete": 1000})
    assert cloud.pod("launch", cloud.describe(), "--run-id", "r1") == 1
    printed = capsys.readouterr().err
    assert "MACHINE MAY STILL EXIST" in printed
    assert "gcloud compute tpus queued-resources delete my-run-r1 --project=my-project" in printed.splitlines()[-1]
    assert cloud.state["steps"]["delete"] == 5


@pytest.mark.parametrize("step", STEPS)
def test_an_interrupt_in_any_step_leaves_no_machine(cloud, step: str) -> None:
    cloud.script(interrupt=step, hosts=1)
    done = cloud.pod_process("launch", cloud.describe(type="v4-8"), "--run-id", "r1")
    assert (cloud.folder / "interrupted").exists()
    assert cloud.state["created"] == 1  # a request for a machine is not cut short, so that it can be deleted
    assert cloud.state["machines"] == {}
    # While it is being deleted there is nothing left to interrupt.
    assert done.returncode == (0 if step == "delete" else 130), done.stderr


def test_a_command_that_fails_fails_the_run_and_its_outputs_are_fetched(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    assert cloud.pod("launch", cloud.describe(command=["bash", "-c", "echo why >&2; exit 3"]), "--run-id", "r1") == 1
    assert "exit 3" in capsys.readouterr().err
    assert cloud.result("r1", 1, "stderr") == "why\n"
    assert cloud.state["machines"] == {}


@pytest.mark.parametrize("step", ["describe", "upload", "status"])
def test_lost_capacity_is_retried_under_the_same_run_id(cloud, step: str) -> None:
    cloud.script(preempt={step: 1})
    assert cloud.pod("launch", cloud.describe(spot=True), "--run-id", "r1") == 0
    assert cloud.result("r1", 0, "results/out of it") == "r1 2\n"
    assert cloud.state["created"] == 2
    assert cloud.state["machines"] == {}
    assert all("--spot" in call for call in cloud.calls if "create" in call)


def test_retries_after_lost_capacity_are_bounded(cloud) -> None:
    cloud.script(preempt={"upload": 1000}, hosts=1)
    assert cloud.pod("launch", cloud.describe(type="v4-8", retries=2), "--run-id", "r1") == 1
    assert cloud.state["created"] == 3
    assert cloud.state["machines"] == {}


def test_waiting_for_capacity_ends_at_its_deadline(cloud) -> None:
    cloud.script(states=["WAITING_FOR_RESOURCES"] * 1000)
    assert cloud.pod("launch", cloud.describe(wait="1s", retries=0), "--run-id", "r1") == 1
    assert cloud.state["machines"] == {}


def test_a_run_that_outlives_its_time_is_ended(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    assert cloud.pod("launch", cloud.describe(command=["sleep", "60"], time_to_live="1s"), "--run-id", "r1") == 1
    assert "time to live of 1 s is over" in capsys.readouterr().err
    assert cloud.state["machines"] == {}


def test_a_command_that_hangs_ends_with_the_time_to_live(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.script(hosts=1)
    started = time.monotonic()
    assert cloud.pod("launch", cloud.describe(type="v4-8", setup=["sleep", "40"], time_to_live="1s"), "--run-id", "r1") == 1
    assert time.monotonic() - started < 30
    assert "time to live of 1 s is over" in capsys.readouterr().err
    assert cloud.state["machines"] == {}


def test_a_lost_connection_neither_ends_nor_repeats_the_run(cloud) -> None:
    """Setting up and starting twice is doing it once; a status that cannot be queried for a while is queried again."""
    command = ["bash", "-c", 'sleep 0.3; cat prepared; echo once >> "$PARTINF_RESULTS/times"']
    cloud.script(fail={"status": 3})
    description = cloud.describe(command=command)
    for step in ("create", "wait", "sync", "setup", "setup", "start", "start", "watch", "fetch", "delete"):
        assert cloud.pod(step, description, "--run-id", "r1") == 0, step
    assert cloud.result("r1", 0, "results/times") == "once\n"
    assert cloud.result("r1", 0, "stdout") == "prepared\n"
    assert cloud.state["machines"] == {}


def test_a_machine_of_the_same_run_is_not_deleted_by_a_second_launch(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    description = cloud.describe()
    assert cloud.pod("create", description, "--run-id", "r1") == 0
    assert cloud.pod("launch", description, "--run-id", "r1") == 1
    assert "exists already" in capsys.readouterr().err
    assert list(cloud.state["machines"]) == ["my-run-r1"]


def test_listing_and_reaping_delete_what_outlived_its_time_and_nothing_else(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    for run, life in (("old", "1s"), ("young", "1h")):
        assert cloud.pod("create", cloud.describe(time_to_live=life), "--run-id", run) == 0
    time.sleep(1.1)
    assert cloud.pod("list", cloud.describe()) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert cloud.pod("reap", cloud.describe(), "--dry-run") == 0
    assert len(cloud.state["machines"]) == 2
    assert cloud.pod("reap", cloud.describe()) == 0
    assert list(cloud.state["machines"]) == ["my-run-young"]


def test_logs_follow_every_worker_until_the_run_ends(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    description = cloud.describe(command=["bash", "-c", "echo first; sleep 0.3; echo second"])
    for step in ("create", "sync", "setup", "start"):
        assert cloud.pod(step, description, "--run-id", "r1") == 0
    capsys.readouterr()
    assert cloud.pod("logs", description, "--run-id", "r1") == 0
    printed = capsys.readouterr().out
    assert sorted(printed.splitlines()) == [f"[worker {worker}] {line}" for worker in (0, 1) for line in ("first", "second")]


def test_the_dry_run_prints_what_is_executed(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    """The same lines in the same order, but for how often a machine is looked at and the second at which its time is over."""
    description = cloud.describe(spot=True)
    assert cloud.pod("launch", description, "--run-id", "r1", "--dry-run") == 0
    dry = capsys.readouterr().out.splitlines()
    assert cloud.calls == []
    assert not (cloud.folder / "my results").exists()
    assert cloud.pod("launch", description, "--run-id", "r1") == 0
    executed = [line.removeprefix("+ ") for line in capsys.readouterr().err.splitlines() if line.startswith("+ ")]
    assert [shlex.split(line) for line in executed if not line.startswith("git")] == cloud.calls
    assert _looks_once(dry) == _looks_once(executed)


def _looks_once(lines: list[str]) -> list[str]:
    """Without the expiry, and with repeated looks (describe, status) as one."""
    plain = [re.sub(r"partinf-expires=\d+", "", line) for line in lines]
    kept: list[str] = []
    for line in plain:
        if not ("describe" in line or " status " in line) or line not in kept[-2:]:
            kept.append(line)
    return kept


@pytest.mark.parametrize("missing", ["project", "zone", "time_to_live"])
@pytest.mark.parametrize("action", ["launch", "create", "delete", "list", "reap", "gke"])
def test_nothing_runs_without_project_zone_and_time_to_live(cloud, action: str, missing: str) -> None:
    assert cloud.pod(action, cloud.describe(**{missing: None}), "--run-id", "r1") == 2
    assert cloud.calls == []


def test_a_large_slice_needs_a_confirmation(cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    description = cloud.describe(confirm_above_chips=7)
    assert cloud.pod("launch", description, "--run-id", "r1") == 2
    assert "8 chips are more than confirm_above_chips = 7: pass --yes" in capsys.readouterr().err
    assert cloud.calls == []
    assert cloud.pod("launch", description, "--run-id", "r1", "--yes") == 0


def test_a_commit_that_does_not_exist_is_refused_before_any_command(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    assert cloud.pod("launch", cloud.describe(commit="no-such-branch"), "--run-id", "r1") == 2
    assert "there is no such commit" in capsys.readouterr().err
    assert cloud.calls == []
