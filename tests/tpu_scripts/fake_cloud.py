"""A Google Cloud and a Kubernetes cluster in a folder: the fake `gcloud` and `kubectl`, started as programs of those names.

They accept the commands and flags of accepted_commands.toml, keep their state in $FAKE_CLOUD/state, log every call, and run what a worker
would run as real processes, one home folder per worker. $FAKE_CLOUD/script says what goes wrong, by step: `fail` (so many times; "late" of
create: it happens and is reported as failed), `reasons` (what a failing step says, with its exit code), `slow` (seconds that a step
takes), `appears` (after so many further looks, what was created and reported as failed is there), `preempt` (so many times the capacity is
lost in that step), `interrupt` (SIGINT to the caller), `states` (what describe says before ACTIVE), `why` (of a FAILED), `hosts`.

The tests start these programs some hundred times, and importing takes longer than all that they do. So what only some commands need is
imported there, the files are marshalled, and paths are text.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import sys
import time

HOME = os.environ["FAKE_CLOUD"]


def main() -> int:
    program = os.path.basename(sys.argv[0])
    words = [program, *sys.argv[1:]]
    with open(f"{HOME}/calls", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        log.write(repr(words).encode() + b"\n")
    try:
        command, places, flags = _parse(words)
        state = _read("state")
        cloud = Cloud(state, _read("script"), places, flags)
        try:
            return cloud.kubectl(command) if program == "kubectl" else cloud.gcloud(command)
        finally:
            with open(f"{HOME}/state", "wb") as file:
                marshal.dump(state, file)
    except Refused as refusal:
        print(f"ERROR: ({program}) {refusal}", file=sys.stderr)
        return refusal.code


def _read(name: str) -> dict:
    with open(f"{HOME}/{name}", "rb") as file:
        return marshal.load(file)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Refused(Exception):
    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def _parse(words: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """The command, its positional arguments and its flags, or a refusal of what the data file does not list."""
    table = _read("accepted_commands")
    plain = [word for word in words if not word.startswith("--")]
    command = next((name for name in table if " " in name and plain[: name.count(" ") + 1] == name.split()), None)
    if command is None:
        raise Refused(f"Invalid choice: {' '.join(plain[:5])}", 2)
    allowed = table[command]["flags"] + table[words[0]]["flags"]
    flags = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            if name + equals not in allowed:
                raise Refused(f"unrecognized arguments: {word}", 2)
            flags[name] = value
    places = plain[command.count(" ") + 1 :]
    low, high = table[command]["places"]
    if not low <= len(places) <= high:
        raise Refused(f"{len(places)} positional arguments, expected {low} to {high}", 2)
    return command, places, flags


class Cloud:
    """One call on the state."""

    def __init__(self, state: dict, script: dict, places: list[str], flags: dict[str, str]) -> None:
        self.state, self.script, self.places, self.flags = state, script, places, flags

    def gcloud(self, command: str) -> int:
        if not self.flags.get("--project") or not self.flags.get("--zone"):
            raise Refused("The required property [project] or [zone] is not set", 2)
        group, verb = command.split()[-2:]
        step = verb
        if group == "tpu-vm":
            step = ("upload" if self.places[-1].endswith(":") else "download") if verb == "scp" else self._ssh_step()
        late = self._trouble(step)
        code = getattr(self, f"_{verb}")()
        if late:
            raise Refused("INTERNAL: the answer was lost")
        return code

    def _ssh_step(self) -> str:
        return self.flags["--command"].split()[2]

    def _trouble(self, step: str) -> bool:
        """What the script has in store for this step; True when it shall happen and be reported as failed."""
        self.state["steps"][step] = self.state["steps"].get(step, 0) + 1
        if self.script.get("interrupt") == step and not os.path.exists(f"{HOME}/interrupted"):
            open(f"{HOME}/interrupted", "w").close()
            os.kill(os.getppid(), 2)
            time.sleep(0.1)
        if self.script.get("preempt", {}).get(step, 0) >= self.state["steps"][step]:
            for machine in self.state["machines"].values():
                machine["state"] = "SUSPENDED"
                self._stop(machine)
        left = self.script.get("fail", {}).get(step, 0)
        time.sleep(self.script.get("slow", {}).get(step, 0))
        if left == "late":
            return True
        if left and self.state["steps"][step] <= left:
            raise Refused(*self.script.get("reasons", {}).get(step, (f"INTERNAL: {step} fails as the script says", 1)))
        return False

    def _machine(self, active: bool = False) -> dict:
        name = self.places[-1].removesuffix(":") if self.flags.get("--worker") == "all" else self.places[0].partition(":")[0]
        machine = self.state["machines"].get(name)
        if machine is not None and machine["unseen"]:
            machine["unseen"] -= 1
            machine = None
        if machine is None:
            raise Refused(f"NOT_FOUND: {name}")
        if active and machine["state"] != "ACTIVE":
            raise Refused(f"{name} is {machine['state']}, ssh: connect to host port 22: Connection refused", 255)
        return machine

    def _homes(self, machine: dict) -> list[str]:
        homes = machine["homes"]
        worker = self.flags.get("--worker", "0")
        return homes if worker == "all" else [homes[int(worker)]]

    def _create(self) -> int:
        name = self.places[0]
        if name in self.state["machines"]:
            raise Refused(f"ALREADY_EXISTS: {name}")
        labels = dict(pair.split("=") for pair in self.flags["--labels"].split(","))
        homes = [f"{HOME}/machines/{name}/worker {number}" for number in range(self.script.get("hosts", 2))]
        for home in homes:
            os.makedirs(home)
        where = f"projects/{self.flags['--project']}/locations/{self.flags['--zone']}/queuedResources/{name}"
        states = self.script.get("states", [])
        machine = {"name": where, "state": "ACTIVE", "before": list(states), "labels": labels, "homes": homes, "port": _free_port()}
        machine["unseen"] = self.script.get("appears", 0)
        self.state["machines"][name] = machine
        self.state["created"] += 1
        return 0

    def _describe(self) -> int:
        machine = self._machine()
        if "failedData" in self.flags["--format"]:
            print(self.script.get("why", ""))
            return 0
        print(machine["before"].pop(0) if machine["before"] and machine["state"] == "ACTIVE" else machine["state"])
        return 0

    def _list(self) -> int:
        import json

        rows = [
            {"name": m["name"], "state": {"state": m["state"]}, "tpu": {"nodeSpec": [{"node": {"labels": m["labels"]}}]}}
            for m in self.state["machines"].values()
            if not m["unseen"]
        ]
        print(json.dumps(rows))
        return 0

    def _delete(self) -> int:
        import shutil

        machine = self._machine()
        if "--force" not in self.flags:
            raise Refused("FAILED_PRECONDITION: the queued resource has nodes")
        self._stop(machine)
        shutil.rmtree(f"{HOME}/machines/{self.places[0]}")
        del self.state["machines"][self.places[0]]
        return 0

    def _scp(self) -> int:
        import shutil

        machine = self._machine(active=True)
        if self.places[-1].endswith(":"):
            for home in self._homes(machine):
                for source in self.places[:-1]:
                    shutil.copy(source, home)
        else:
            shutil.copy(f"{self._homes(machine)[0]}/{self.places[0].partition(':')[2]}", self.places[1])
        return 0

    def _ssh(self) -> int:
        import subprocess

        machine = self._machine(active=True)
        homes, everyone = self._homes(machine), machine["homes"]
        command = ["bash", "-c", self.flags["--command"]]
        # What jax learns from the metadata of a real TPU: who the others are.
        others = {"PARTINF_COORDINATOR": f"localhost:{machine['port']}", "PARTINF_NUM_PROCESSES": str(len(everyone))}
        processes = [
            subprocess.Popen(
                command,
                cwd=home,
                env={**os.environ, **others, "PARTINF_PROCESS_ID": str(everyone.index(home)), "HOME": home},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
            )
            for home in homes
        ]
        codes = []
        for process in processes:
            print(process.communicate()[0], end="")
            codes.append(process.returncode)
        return max(codes)

    @staticmethod
    def _stop(machine: dict) -> None:
        """End what the workers run: each run is the leader of its own group."""
        import glob

        for home in machine["homes"]:
            for run in glob.glob(f"{home}/partinf-pod/runs/*/"):
                if os.path.exists(f"{run}pid") and not os.path.exists(f"{run}exit_code"):
                    with open(f"{run}pid") as file:
                        pid = int(file.read())
                    if os.path.exists(f"/proc/{pid}"):
                        os.killpg(pid, 9)

    def kubectl(self, command: str) -> int:
        if "--context" not in self.flags:
            raise Refused("no context is set")
        verb = command.split()[-1]
        self._trouble(f"kubectl-{verb}")
        return getattr(self, f"_kube_{verb}")()

    def _kube_apply(self) -> int:
        import json
        import subprocess

        with open(self.flags["--filename"]) as file:
            jobset = json.load(file)
        if jobset["kind"] != "JobSet" or jobset["metadata"]["namespace"] != self.flags["--namespace"]:
            raise Refused("no matches for kind")
        job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
        container = job["template"]["spec"]["containers"][0]
        folder = self._working_directory(job["template"], container)
        environment = {**os.environ, **{pair["name"]: pair["value"] for pair in container["env"]}}
        done = [
            subprocess.run(container["command"], env=environment, capture_output=True, text=True, cwd=folder)
            for _ in range(job["completions"])
        ]
        logs = "".join(f"[pod/{number}] {line}\n" for number, pod in enumerate(done) for line in pod.stdout.splitlines())
        state = "Failed" if any(pod.returncode for pod in done) else "Completed"
        self.state["jobsets"][jobset["metadata"]["name"]] = {"state": state, "logs": logs}
        return 0

    @staticmethod
    def _working_directory(template: dict, container: dict) -> str:
        """Where the container's command runs, with the annotations that a volume shows there as files."""
        import re

        if "workingDir" not in container:
            return HOME
        folder = f"{HOME}/pod{container['workingDir']}"
        os.makedirs(folder, exist_ok=True)
        mounted = {mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == container["workingDir"]}
        for volume in template["spec"]["volumes"]:
            for item in volume.get("downwardAPI", {}).get("items", []) if volume["name"] in mounted else []:
                key = re.fullmatch(r"metadata\.annotations\['(.+)'\]", item["fieldRef"]["fieldPath"])
                with open(f"{folder}/{item['path']}", "w") as file:
                    file.write(template["metadata"]["annotations"][key[1]])
        return folder

    def _kube_get(self) -> int:
        print(self._jobset(self.places[1])["state"], end="")
        return 0

    def _kube_logs(self) -> int:
        print(self._jobset(self.flags["--selector"].partition("=")[2])["logs"], end="")
        return 0

    def _kube_delete(self) -> int:
        if self.state["jobsets"].pop(self.places[1], None) is None and "--ignore-not-found" not in self.flags:
            raise Refused("NotFound")
        return 0

    def _jobset(self, name: str) -> dict:
        if name not in self.state["jobsets"]:
            raise Refused(f"jobsets.jobset.x-k8s.io {name!r} not found")
        return self.state["jobsets"][name]
