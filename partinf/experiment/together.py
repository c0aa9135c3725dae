"""Starting several processes on this machine that join as one (`partinf.hosts.join`); on CPU their collectives go over Gloo."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from partinf.hardware.platform import CPU
from partinf.hosts.job import NAMES


class ProcessFailed(RuntimeError):
    """One of the processes ended with an error, or they did not end in time."""


def run_local(command: Sequence[str], count: int, devices: int, results: Path, timeout: float) -> None:
    """Run a command in `count` processes of `devices` virtual CPU devices each.

    All processes are ended when one fails or time is over.

    Args:
        results: a folder for what they have to tell, which they find as $PARTINF_RESULTS; on stdout others write too (Gloo does).

    Raises:
        ProcessFailed: with the last lines of what the first failed process wrote to stderr.
    """
    address = f"localhost:{free_port()}"
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as files:
        folder = Path(name)
        try:
            for number in range(count):
                environment = os.environ | dict(zip(NAMES, (address, str(count), str(number)), strict=True))
                environment |= CPU.environment(devices) | {"PARTINF_RESULTS": str(results)}
                out, err = (files.enter_context((folder / f"{kind}-{number}").open("wb")) for kind in ("out", "err"))
                processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True))
            _wait(processes, folder, timeout)
        finally:
            for process in processes:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path, timeout: float) -> None:
    ends = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        for number, code in enumerate(codes):
            if code:
                last = (folder / f"err-{number}").read_text(errors="replace").strip().splitlines()[-12:]
                raise ProcessFailed("\n".join([f"process {number} of {len(processes)} ended with {code}:", *last]))
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > ends:
            raise ProcessFailed(f"{len(processes)} processes did not end within {timeout:.0f} s")
        time.sleep(0.05)


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
