#!/usr/bin/env python3
"""Run a command on a TPU slice and leave nothing behind: `pod.py launch FILE` creates, runs, fetches and deletes.

`pod.py ACTION FILE` takes one description file; README.md next to this file explains it. The single steps are actions of their own, for a
machine that one wants to keep for a while: it stays until `delete`, or until `reap` finds that its time to live is over.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pod_checkout  # noqa: F401 – what is imported next imports partinf
from pod_commands import EXPIRES_LABEL, Executor, Gcloud, Interrupted, Recorder, Runner, Signals, delete_machine, list_machines
from pod_cost import estimate
from pod_description import Description, read_description
from pod_failures import reason
from pod_jobset import manifest, run_jobset
from pod_life import Pod, Preempted, StepFailed, create, launch

from partinf.foundation import documents
from partinf.foundation.errors import InvalidInput, raise_offences
from partinf.planner.files import SavedPlan

STEPS = ("create", "wait", "sync", "setup", "start", "watch", "fetch", "delete")
ACTIONS = {
    "check": "read the description and say what it means",
    "launch": "create, wait, sync, setup, start, watch, fetch and, whatever happens, delete",
    **{step: f"only this step of launch, for --run-id{'' if step != 'create' else ' or a new one'}" for step in STEPS},
    "logs": "follow the outputs of every worker of --run-id",
    "list": "the machines of this project and zone that these scripts made, and when their time is over",
    "reap": "delete those whose time to live is over",
    "manifest": "print the description as a GKE JobSet",
    "gke": "apply that JobSet, wait for its end, keep its logs and delete it",
}


@dataclass(frozen=True)
class Options:
    """What the command line requested, besides the description."""

    action: str
    run_id: str | None = None
    output: Path = Path("pod-runs")
    prices: Path | None = None
    dry_run: bool = False
    yes: bool = False
    poll_seconds: float = 20.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pod.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help="; ".join(f"{name}: {what}" for name, what in ACTIONS.items()))
    parser.add_argument("description", type=Path, metavar="FILE", help="the description, a TOML file")
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="a saved plan: gives the type, is sent along, and is served where there is no command"
    )
    add_options(parser)
    args = parser.parse_args(argv)
    try:
        planned = read_plan(args.plan)
        text = read_text(args.description, "description")
        description = read_description(text, str(args.description), args.description.resolve().parent, planned)
        return perform(options_of(args, args.action), description, planned)
    except InvalidInput as error:
        for offence in error.offences:
            print(f"pod.py: error: {offence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags that `pod.py` and `partinf launch` share."""
    parser.add_argument("--dry-run", action="store_true", help="print exactly the commands that would be executed")
    parser.add_argument("--run-id", metavar="ID", help="name of the run (default: made of the time)")
    parser.add_argument("--output", type=Path, default=Path("pod-runs"), metavar="DIR", help="where results go (default: pod-runs)")
    parser.add_argument("--prices", type=Path, metavar="FILE", help="prices in place of the hardware table's; see tpu_scripts/README.md")
    parser.add_argument("--yes", action="store_true", help="do not ask before creating a large slice")
    parser.add_argument("--poll-seconds", type=float, default=20.0, metavar="S", help="between two looks at a machine (default: 20)")


def options_of(args: argparse.Namespace, action: str) -> Options:
    """The parsed flags of `add_options`."""
    return Options(action, args.run_id, args.output, args.prices, args.dry_run, args.yes, args.poll_seconds)


def read_plan(path: Path | None) -> SavedPlan | None:
    """A saved plan."""
    return None if path is None else SavedPlan.of(read_text(path, "plan"), str(path))


def perform(options: Options, description: Description, planned: SavedPlan | None = None) -> int:
    """Carry out one action and return the exit code.

    Raises:
        InvalidInput: a bad run id or price file, a commit that does not exist, or a large slice without confirmation.
    """
    _check(options)
    if options.action == "check":
        return _say_what(description, options)
    plan_text = None if planned is None else planned.text
    run_id = options.run_id or time.strftime("%y%m%d-%H%M%S", time.gmtime())
    if options.action == "manifest":
        print(json.dumps(manifest(description, run_id, plan_text), indent=2))
        return 0
    signals = Signals()
    runner: Runner = Recorder() if options.dry_run else Executor(signals=signals)
    if options.action in ("list", "reap"):
        return _list(description, runner, reap=options.action == "reap")
    if options.action in ("launch", "create", "gke"):
        _confirm(description, options)
    output = (options.output / f"{description.name}-{run_id}").absolute()
    try:
        with signals.handled():
            if options.action == "gke":
                return run_jobset(description, run_id, runner, signals, output, options.poll_seconds, plan_text)
            return _on_machine(options, description, run_id, runner, signals, output, plan_text)
    except Interrupted:
        print("pod: interrupted", file=sys.stderr)
        return 130


def _on_machine(
    options: Options, description: Description, run_id: str, runner: Runner, signals: Signals, output: Path, plan_text: str | None
) -> int:
    needs_commit = options.action in ("launch", "sync", "setup", "start")
    commit = _commit(description) if needs_commit else ""
    expires = int(time.time()) + description.time_to_live
    gcloud = Gcloud(description, run_id)
    pod = Pod(description, gcloud, runner, commit, output, expires, signals.sleep, plan_text, options.poll_seconds)
    if options.action == "launch":
        code = launch(pod)
        if not options.dry_run:
            print(f"{'done' if not code else 'failed'}: run {run_id}, outputs in {output}")
        return code
    if options.action == "logs":
        return _follow(pod, signals)
    steps: dict[str, Callable[[], object]] = {step: getattr(pod, step) for step in STEPS}
    steps["create"] = lambda: create(pod)
    try:
        gone = steps[options.action]()
    except (StepFailed, Preempted) as failure:
        print(f"pod: {options.action}: {failure}", file=sys.stderr)
        return 1
    print(f"{options.action}: run {run_id}", file=sys.stderr)
    return 1 if gone is False else 0


def _check(options: Options) -> None:
    offences = []
    if options.run_id is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,24}[a-z0-9])?", options.run_id):
        offences.append(f"--run-id '{options.run_id}': expected lower-case letters, digits and '-', at most 26")
    if options.run_id is None and options.action in (*STEPS[1:], "logs"):
        offences.append(f"--run-id is missing: '{options.action}' belongs to a run that was created before")
    if not options.poll_seconds > 0:
        offences.append(f"--poll-seconds {options.poll_seconds}: expected more than 0")
    raise_offences(offences)


def _say_what(description: Description, options: Options) -> int:
    tpu, cost = description.tpu, estimate(description, options.prices)
    print(f"{description.name}: {tpu.name} is {tpu.slice.name}, {tpu.num_chips} chips on {tpu.num_hosts} hosts")
    print(f"at most {cost.total:.2f} {cost.currency}: {cost.basis}")
    return 0


def _confirm(description: Description, options: Options) -> None:
    cost = estimate(description, options.prices)
    print(f"pod: at most {cost.total:.2f} {cost.currency}: {cost.basis}", file=sys.stderr)
    chips = description.tpu.num_chips
    if options.dry_run or options.yes or chips <= description.confirm_above_chips:
        return
    question = f"{chips} chips are more than confirm_above_chips = {description.confirm_above_chips}"
    if not sys.stdin.isatty():
        raise InvalidInput(f"{question}: pass --yes to create them")
    if input(f"{question}. Type {chips} to create them: ").strip() != str(chips):
        raise InvalidInput("not confirmed; nothing was created")


def _commit(description: Description) -> str:
    """The full hash of the commit, which exists; uncommitted changes are mentioned, because they are not sent."""
    if shutil.which("git") is None:
        raise InvalidInput("git is not on PATH; what is sent is a git commit")
    git = ["git", "-C", str(description.repository)]
    found = subprocess.run([*git, "rev-parse", "--verify", "--quiet", f"{description.commit}^{{commit}}"], capture_output=True, text=True)
    if found.returncode:
        raise InvalidInput(f"commit '{description.commit}': there is no such commit in {description.repository}")
    if subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip():
        print(f"pod: {description.repository} has uncommitted changes; they are not sent", file=sys.stderr)
    return found.stdout.strip()


def _list(description: Description, runner: Runner, reap: bool) -> int:
    done = runner.run(list_machines(description))
    if done.code:
        print(f"pod: {reason(done)}", file=sys.stderr)
        return 1
    code = 0
    for machine in json.loads(done.out or "[]"):
        nodes = machine.get("tpu", {}).get("nodeSpec", [])
        expires = (nodes[0].get("node", {}).get("labels", {}) if nodes else {}).get(EXPIRES_LABEL, "")
        if not expires.isdigit():
            continue
        name, left = machine["name"].rpartition("/")[2], int(expires) - int(time.time())
        state = machine.get("state", {}).get("state", "")
        print(f"{name}\t{state}\t{f'{left} s left' if left > 0 else f'over since {-left} s'}")
        if reap and left <= 0:
            code |= min(1, runner.run(delete_machine(description, name)).code)
    return code


def _follow(pod: Pod, signals: Signals) -> int:
    """Every worker's outputs as they come, each line with its worker in front; ends when the run does."""
    commands = [pod.gcloud.worker("follow", pod.gcloud.run_id, worker=worker) for worker in range(pod.description.tpu.num_hosts)]
    if pod.runner.dry:
        for command in commands:
            pod.runner.run(command)
        return 0
    processes = [subprocess.Popen(command.argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) for command in commands]

    def copy(worker: int, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            print(f"[worker {worker}] {line.rstrip()}", flush=True)

    threads = [threading.Thread(target=copy, args=pair, daemon=True) for pair in enumerate(processes)]
    try:
        for thread in threads:
            thread.start()
        with signals.interruptible():
            return max(process.wait() for process in processes)
    finally:
        for process in processes:
            process.terminate()
        for thread, process in zip(threads, processes, strict=True):
            thread.join(timeout=5)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def read_text(path: Path, what: str) -> str:
    """A file that the user named."""
    return documents.read_text(path, f"{what} '{path}'", documents.TOML_BYTES)


if __name__ == "__main__":
    sys.exit(main())
