"""Deleting what a run has requested: until it is gone, or until a bound, when what may be left is printed with the command that deletes it.

Deleting what is not there yet deletes nothing. So where a request was not answered clearly, "there is no such thing" is no answer either
until `LOOK_SECONDS` have gone by.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from pod_commands import Command, Runner
from pod_failures import reason

DELETE_ATTEMPTS = 5
LOOK_SECONDS = 45.0  # the API shows a request that it has accepted within seconds
_ABSENT = re.compile(r"\bNOT_FOUND\b|\bNotFound\b")  # of gcloud and of kubectl


@dataclass(frozen=True)
class Deletion:
    """How to delete one thing.

    Attributes:
        kind: what it is, for people.
        command: deletes it, and fails where it is not there.
        rest: waits, and nothing cuts it short.
        state: what it is doing, queried when it cannot be deleted; empty where it is not known.
    """

    kind: str
    name: str
    command: Command
    runner: Runner
    poll_seconds: float
    now: Callable[[], float] = time.time
    rest: Callable[[float], None] = time.sleep
    state: Callable[[], str] = str

    def until_gone(self, awaited: bool) -> bool:
        """Delete; True when it is gone.

        Args:
            awaited: it was requested and never seen, so it may still come into being.
        """
        until, failed, looked = self.now() + LOOK_SECONDS, 0, False
        while failed < DELETE_ATTEMPTS:
            done = self.runner.run(self.command)
            if not done.code:
                if looked:
                    say(f"{self.name} came after all and is deleted")
                return True
            if not _ABSENT.search(done.err):
                failed += 1
                say(f"deleting failed ({failed} of {DELETE_ATTEMPTS}): {reason(done)}")
            elif not awaited:
                return True
            elif self.now() >= until:
                say(f"{self.kind} MAY STILL COME AND COST MONEY. This checks for it and deletes it: {self.command}")
                return False
            elif not looked:
                looked = True
                say(f"{self.name} was requested, is not there and may still come: looking for it for {LOOK_SECONDS:.0f} s")
            self.rest(self.poll_seconds)
        state = self.state()
        say(f"{self.kind} MAY STILL EXIST AND COST MONEY{f' (it is {state})' if state else ''}. Delete it yourself: {self.command}")
        return False


def say(line: str) -> None:
    print(f"pod: {line}", file=sys.stderr, flush=True)
