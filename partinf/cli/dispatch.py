"""Finds the sub-command, loads its module and no other, and turns what it raises into lines and exit codes.

`partinf plan --help` has to answer at once, so nothing here imports more than argparse; a command's module is imported when the command
is called, and is expected to import numpy, jax and rich inside `run`. absl's argparse adapter is not used: it costs as much time as
everything else here together, and no module of the library defines an absl flag.

Exit codes: 0; 2 for bad input, with one line per offence; 1 for a failure, with one line (and the traceback under `--debug` or
PARTINF_DEBUG=1); 130 and 141 when interrupted or when the reader of the output went away, as a shell reports those signals.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol, cast

from partinf.cli.flags import register
from partinf.foundation.errors import InvalidInput, nearest
from partinf.foundation.extras import PROOF, RUN, SERVE, extra_of, line, need

FAILURE = 1
BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

COMMANDS: Mapping[str, str] = {
    "plan": "choose how a model is split over a slice, and show what each way costs",
    "explain": "print a layout as numbered lines of shapes and collectives",
    "prove": "compile a plan with the TPU compiler, without a TPU: whether it fits, and what runs",
    "calibrate": "measure the local devices and write a hardware file for later plans",
    "demo": "plan, partition and run a small trained model, and check its answers",
    "generate": "continue prompts with a model",
    "score": "print log-probabilities of given texts under a model",
    "serve": "serve a model over HTTP with an OpenAI-compatible API",
    "bench": "time the real engine under a load of arriving requests",
    "simulate": "simulate serving on any slice, on a virtual clock",
    "run": "run a described experiment on this machine, in several processes, on a pod or in the simulator",
    "launch": "run a saved plan on a TPU slice, or print the commands that would",
}

# The extra that a command needs whatever its flags say. Others need one for some flags only, such as `--slice local`.
_NEEDS: Mapping[str, str] = {
    "prove": PROOF,
    "calibrate": RUN,
    "demo": RUN,
    "generate": RUN,
    "score": RUN,
    "serve": SERVE,
    "bench": RUN,
}


class Command(Protocol):
    """What a module `partinf.cli.<command>` offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments; may set `parser.description` and `parser.epilog`."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the command and return its exit code."""


class _Parser(argparse.ArgumentParser):
    """One line for a bad flag, as for every other offence, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {_one_line(message)} (see '{self.prog} --help')\n")


class _Version(argparse.Action):
    """Looks the version up only on request: package metadata takes as long to import as argparse."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("partinf")
        except PackageNotFoundError:
            number = "(not installed)"
        print(f"partinf {number}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `partinf` with these arguments (those of the process by default) and return its exit code.

    Raises:
        SystemExit: From argparse, for `--help`, `--version` and bad flags.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug, who = False, "partinf"
    try:
        try:
            args = _parse(arguments)
            debug = args.debug or os.environ.get("PARTINF_DEBUG", "0") not in ("", "0")
            who = f"partinf {args.command}"
            if args.command in _NEEDS:
                need(_NEEDS[args.command], who)
            return int(args.run(args))
        finally:
            # Here rather than at interpreter exit, where a reader that went away could no longer be handled.
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("partinf: interrupted", file=sys.stderr)
        return INTERRUPTED
    except InvalidInput as error:
        for offence in error.offences:
            print(f"partinf: error: {_one_line(offence)}", file=sys.stderr)
        return BAD_INPUT
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError) and (extra := extra_of(error.name)):
            print(f"partinf: error: {line(extra, who, [str(error.name).partition('.')[0]])}", file=sys.stderr)
            return BAD_INPUT
        print(f"partinf: error: {_summary(error)} (--debug shows the traceback)", file=sys.stderr)
        return FAILURE


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="partinf", description="Plan, prove and run partitioned Transformer inference.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    # Options before the command take no value, so the first word that is not an option is the command.
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        parser.error(f"unknown command '{chosen}'{nearest(chosen, COMMANDS)}")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False)
        if name == chosen:
            command = cast(Command, importlib.import_module(f"partinf.cli.{name}"))
            register(subparser)
            command.add_arguments(subparser)
            # SUPPRESS keeps a `--debug` that stood before the command.
            subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of a failure")
            subparser.set_defaults(run=command.run, command=name)
    return parser.parse_args(arguments)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _summary(error: Exception) -> str:
    """The kind of failure and the first line of its message: compilers and file systems put the cause first and pages after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _discard_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's own flush at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
