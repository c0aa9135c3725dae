"""Processes for work of untrusted clients, which can be ended whatever it does: how one is started, talks and is bounded.

A module that is run this way talks over the socket that is its standard input, in frames: four bytes of length, then what the two agree on.
It ends when the one that started it closes the socket, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import IO

from partinf.foundation import resources

LENGTH = struct.Struct("!I")


def start(module: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts a module, which does not wait until it has come up; the process, and the socket to it."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", module],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # it would repeat what clients send
                env={**os.environ, "PYTHONPATH": resources.python_path()},
            )
        except BaseException:
            ours.close()
            raise
    return child, ours


def end(child: subprocess.Popen[bytes]) -> int:
    """End a process, in the middle of whatever it does, unless it has ended; its exit code."""
    code = child.poll()
    if code is None:
        child.kill()
        code = child.wait()
    return code


def framed(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body


def connect() -> socket.socket:
    """In the process that was started: the socket to the one that did. Signals to whole groups of processes do nothing here."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return socket.socket(fileno=0)


def next_frame(frames: IO[bytes]) -> bytes:
    """The next frame; nothing where the other side has gone."""
    head = frames.read(LENGTH.size)
    return frames.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def bound_memory(more: int) -> None:
    """Let this process take this much more; on systems that do not say what it takes now, of the heap alone."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (more + (64 << 20),) * 2)
