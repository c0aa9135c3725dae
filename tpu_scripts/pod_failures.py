"""What a failed command means: one table from what gcloud says to what a run does about it.

Two questions decide: may the same request succeed later, and what may a refused or unanswered request for a machine have left behind. The
texts are those of Google's API errors and of gcloud; the first row that fits counts. What fits none is not repeated, and what it requested
is looked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from pod_commands import Done


class Left(Enum):
    """What a request for a machine leaves behind when it fails."""

    NOTHING = "it was refused before anything was made"
    RECORD = "it was refused; a record of it may be there, to be deleted once"
    UNCLEAR = "the machine may still come into being"


@dataclass(frozen=True)
class Failure:
    """A kind of failure.

    Attributes:
        pattern: what the command says, without regard to case.
        again: whether the same request may succeed later.
        left: what a request for a machine leaves behind.
    """

    name: str
    pattern: str
    again: bool
    left: Left


EXISTS = Failure("exists", r"ALREADY_EXISTS|already exists", False, Left.NOTHING)
USAGE = Failure("usage", r"unrecognized arguments|Invalid choice|is it installed and on PATH", False, Left.NOTHING)
UNKNOWN = Failure("unknown", "", False, Left.UNCLEAR)
TABLE = (
    EXISTS,
    USAGE,
    Failure(
        "login",
        r"UNAUTHENTICATED|gcloud auth|active account|reauthenticat|auth tokens|invalid_grant|authentication (credential|scope)",
        False,
        Left.NOTHING,
    ),
    Failure(
        "project",
        r"PERMISSION_DENIED|permission denied on|not have (permission|access)|SERVICE_DISABLED|has not been used in project"
        r"|not enabled on project|billing|required property|\bproject\b.*(not found|deleted|not exist|not (a )?valid|invalid|must be set)",
        False,
        Left.NOTHING,
    ),
    Failure("rate", r"rate.?limit|per minute|too many requests|(?<![\w-])429(?![\w-])", True, Left.NOTHING),
    Failure("quota", r"quota", False, Left.RECORD),  # the chips that a project may have at all: waiting does not change it
    Failure(
        "capacity", r"capacity|stock.?out|out of stock|enough resources|RESOURCE.?(POOL.?)?EXHAUSTED|different zone", True, Left.RECORD
    ),
    Failure("request", r"INVALID_ARGUMENT|FAILED_PRECONDITION|OUT_OF_RANGE|UNIMPLEMENTED|NOT_FOUND", False, Left.NOTHING),
    Failure("unavailable", r"UNAVAILABLE|ABORTED|try again|retry|(?<![\w-])50[234](?![\w-])|connection|network", True, Left.UNCLEAR),
    Failure("internal", r"INTERNAL|DEADLINE_EXCEEDED|CANCELLED|timed out|no answer", False, Left.UNCLEAR),
)


def classify(done: Done) -> Failure:
    """The kind of a failed gcloud command."""
    if done.code in (2, 127):  # gcloud's own code for a command line that it does not take; ours for a missing program
        known = [failure for failure in TABLE[:4] if re.search(failure.pattern, done.err, re.IGNORECASE)]
        return known[0] if known else USAGE
    return classify_text(done.err or done.out)


def classify_text(text: str) -> Failure:
    """The kind of what an API error says."""
    return next((failure for failure in TABLE if re.search(failure.pattern, text, re.IGNORECASE)), UNKNOWN)


def unreachable(done: Done) -> bool:
    """Whether ssh did not get through to a worker, in contrast to a command that failed there."""
    return done.code == 255 or "return code [255]" in done.err


def reason(done: Done) -> str:
    """In one line why a command failed: gcloud's own error with what it advises, else the last line of stderr or stdout."""
    lines = [line.strip() for line in (done.err or done.out).splitlines() if line.strip()]
    first = next((number for number, line in enumerate(lines) if line.startswith("ERROR")), len(lines) - 1)
    if not lines:
        return f"exit code {done.code}"
    whole = " ".join(lines[first:])
    if "return code [" in whole and first:  # what gcloud says of ssh is less than what ssh printed just before
        whole = f"{lines[first - 1]} ({whole})"
    return whole if len(whole) <= 500 else whole[:497] + "..."
