"""Files and command lines that are wrong at random, from a seed, and what the command line makes of them."""

from __future__ import annotations

import contextlib
import io
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from partinf.cli import main
from partinf.experiment.description import read_experiment
from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput
from partinf.hardware.hardware_file import write_hardware
from partinf.hardware.rates import CollectiveRate
from partinf.planner.files import saved_plan
from tests.cli.words import with_flags
from tests.core.test_hardware_file import CHIP, RATES
from tests.tpu_scripts.support import GOOD, to_toml

# Of every type, and at the ends of the ranges of floats, of machine integers and of our own.
VALUES = [
    *("3", "-1", "0", "1", "0.5", "8.0", "-0.0", "1e400", "-1e400", "nan", "inf", "1e-320", "1e300", "1e18", "4294967296"),
    *("9223372036854775807", "9223372036854775808", "1" + "0" * 400, "9" * 5000, "0x" + "f" * 4000, "1048576", "1048577", "1000000000"),
    *("true", '""', '"x"', '"²"', '"auto"', '"local"', '"' + "x" * 5000 + '"', "1979-05-27", "07:32:00"),
    *("[]", "{}", "[1]", '["x"]', '["x", 3]', "{ x = 3 }", '{ x = "heads" }', "[" * 70 + "]" * 70, "[" * 5000, "a.b.c"),
]
BYTES = [
    b"\xff",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n",
    b'"',
    b"'",
    b"[",
    b"{",
    b"=",
    b"#",
    b"\xc2\xb2",
    b"\xed\xa0\x80",
    b"0",
    b"9",
    b"-",
]
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"2023-11-16 18:15:{46 + n}.6805900,{37 * n},{n}\n" for n in range(10))
EXPERIMENT = """\
model = "demo"
slice = "cpu:2x2"
layout = "auto"
weights = "f32"
kv = "f32"
processes = 2
requests = 3
lengths = "uniform:4-8:2-4"
seed = 1
scheduler = "fcfs"
max_batch = 4
prefill_tokens = 32
page_size = 8
rounds = 1
"""


@dataclass(frozen=True)
class Kind:
    """One kind of file: a right one, and the exit code of reading one."""

    name: str
    text: str
    read: Callable[[Path], int]


def kinds() -> list[Kind]:
    """Every kind of TOML file, and traces."""
    ops = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")
    measured = replace(CHIP, rates=replace(RATES, collectives=tuple(CollectiveRate(op, n, 1e-4, 1.0) for op in ops for n in (2, 8))))
    llama, chips, roles = ["--model", "llama-3-8b"], ["--slice", "v4:2x2x2"], ["--layout", "ws-1d"]
    explain = ["explain", "--phase", "decode", "--batch", "8", "--context", "512"]
    simulate = ["simulate", *llama, *chips, *roles, "--requests", "5", "--format", "json"]
    on_cpu = ["--slice", "cpu:2x2x2", "--weights", "f32", "--kv", "f32"]
    model, layout = resources.find("models", "llama-3-8b").read_text(), resources.find("layouts", "ws-2d").read_text()
    plan = resources.find("layouts", "palm-62b-low-latency").read_text()
    return [
        Kind("model", model, lambda path: quiet([*explain, *chips, *roles, "--model", str(path)])),
        Kind("layout", layout, lambda path: quiet([*explain, *chips, *llama, "--layout", str(path)])),
        Kind("plan", plan, lambda path: refused(lambda: saved_plan(path.read_bytes().decode(), str(path)))),
        Kind("description", EXPERIMENT, lambda path: refused(lambda: read_experiment(path))),
        Kind("hardware", write_hardware(measured), lambda path: quiet([*explain, *llama, *on_cpu, *roles, "--hardware", str(path)])),
        Kind("pod", to_toml(GOOD), lambda path: refused(lambda: _pod(path))),
        Kind("trace", TRACE, lambda path: quiet([*simulate, "--arrivals", f"trace:{path}"])),
    ]


def _pod(path: Path) -> None:
    import pod_description

    pod_description.read_description(path.read_bytes().decode(), str(path), path.parent)


def quiet(arguments: list[str]) -> int:
    """The exit code of a command line, that of argparse among them, and nothing printed. What is raised is not caught."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return main(["--debug", *arguments])
        except SystemExit as ended:
            return int(ended.code or 0)


def refused(call: Callable[[], object]) -> int:
    """0, or 2 for bad input."""
    try:
        call()
    except (InvalidInput, UnicodeDecodeError):  # the latter from this module's own reading
        return 2
    return 0


def mutated(rng: random.Random, text: str) -> bytes:
    """The text with one to three things wrong."""
    data = text.encode()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice((_other_value, _other_value, _other_value, _other_line, _other_bytes))(rng, data)
    return data


def _other_value(rng: random.Random, data: bytes) -> bytes:
    """A value, within a line or all of it, replaced."""
    found = list(re.finditer(rb'"[^"\n]*"|\[[^\]\n]*\]|\{[^}\n]*\}|(?<=[=,] )[^,\n]+|(?<=[,:-])\d+', data))
    if not found:
        return data
    place = rng.choice(found)
    return data[: place.start()] + rng.choice(VALUES).encode() + data[place.end() :]


def _other_line(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            del lines[place]
        case 1:
            lines.insert(place, rng.choice(lines))
        case 2:
            lines.insert(place, f"{rng.choice(('extra', 'x', '[new]', 'axes', 'decode.gather'))} = {rng.choice(VALUES)}".encode())
        case 3:
            lines[place] = lines[place][1:]
        case _:
            lines = lines[:place]
    return b"\n".join(lines)


def _other_bytes(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(BYTES) * rng.choice((1, 1, 2, 50)) + data[place + rng.choice((0, 1)) :]


NUMBERS = [
    *("0", "1", "2", "7", "-1", "+3", "²", "١", "1_0", " 5", "", "x", "1e3", "1.5", "1e400", "nan", "inf", "-inf", "-0", "-0.0", "1e-320"),
    *("1e-200", "1048576", "1048577", "16777216", "16777217", "1000000000", "2147483648", "9223372036854775808", "1e18", "1" + "0" * 500),
    "9" * 5000,
]
FEW = ["1", "2", "3", "0", "-1", "²", "1e18", "1000001", "1000000000", "9" * 5000, "x"]  # of what takes time for each
SLICES = ["v5e:2x2", "v4:2x2x2", "h200:8", "cpu:2x2", "cpu:3", "v4:2x2x2*2", "cpu:1048576", "cpu:100000000", "v5e:99999x99999", "v5e:4x٤"]
SLICES += ["v4:4x4x4*1000000000", "cpu:0", "v5p:2x2x0", "cpu:" + "9" * 5000, "cpu:" + "x".join(["2"] * 99)]
SLICES += ["auto:v5e", "auto:", ":", "", "tpu7x:2x2x1"]
MESHES = ["x:2,y:2", "4x1", "1000000000x1", "x:1000000000,y:1", "x:2,x:2", "x:0", "auto", "²x2", "x0:2,y:2"]
MESHES += [",".join(f"a{n}:1" for n in range(99))]
WORDS = ["", "x", "auto", "none", "²", "f32", "int8", "bf16", "plain", "tiled", "looped", "json", "table", "decode", "prefill", "mlfq"]
FILES = [*WORDS, "/", "/dev/null", "a\0b", "a" * 5000]
ARRIVALS = ["poisson:1", "poisson:1e-300", "poisson:1e9", "poisson:1e-6", "gamma:1:1e-200", "gamma:1:1000", "gamma:²:1", "backlog"]
ARRIVALS += ["trace:/", "trace:/dev/null", "poisson:" + "9" * 5000, "gamma:1:0.001", "poisson:nan", "trace:", "burst:3"]
LENGTHS = ["fixed:8:2", "fixed:16777216:1", "fixed:1:16777216", "uniform:1-4:1-4", "uniform:4-1:1-1", "fixed:²:1", "chat:1"]
LENGTHS += ["fixed:" + "9" * 5000 + ":1"]
_WORKLOAD = {
    **dict.fromkeys(("--batch", "--prefill-batch", "--input", "--output", "--context"), NUMBERS),
    **dict.fromkeys(("--phase", "--weights", "--kv", "--program", "--calibration", "--bandwidth-model"), WORDS),
    "--hardware": FILES,
    "--slice": SLICES,
    "--mesh": MESHES,
    "--model": ["demo", "llama-3-8b", "dmo", "/", "/dev/null", "", "a\0b", "a" * 5000, "\udcff"],
}
_FIGURES = dict.fromkeys(("--seed", "--max-batch", "--alpha-ms", "--ttft", "--tpot", "--max-len", "--prefill-tokens"), NUMBERS)
_FIGURES |= dict.fromkeys(("--page-size", "--kv-pages", "--residents", "--host-memory", "--stages", "--overhead-us"), NUMBERS)
_SERVED = dict.fromkeys(("--scheduler", "--eviction", "--layout"), FILES)
_SERVED |= {"--requests": FEW, "--arrivals": ARRIVALS, "--lengths": LENGTHS, "--format": WORDS}
_PLACED = {flag: pool for flag, pool in _WORKLOAD.items() if pool not in (NUMBERS,) and flag not in ("--phase", "--bandwidth-model")}
_ASKED = dict.fromkeys(("--max-latency-ms", "--arrivals", "--price-per-chip-hour", "--top"), NUMBERS)
_ASKED |= {"--objective": WORDS, "--format": WORDS}
COMMANDS: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "plan": (["--model", "llama-3-8b", "--slice", "v5e:2x2", "--input", "64", "--output", "8", "--top", "2"], {**_WORKLOAD, **_ASKED}),
    "explain": (["--model", "llama-3-8b", "--slice", "v5e:2x2", "--input", "64", "--output", "8"], {**_WORKLOAD, "--layout": FILES}),
    "simulate": (
        ["--model", "llama-3-8b", "--slice", "v5e:2x2", "--requests", "3", "--lengths", "fixed:8:2"],
        {**_PLACED, **_SERVED, **_FIGURES},
    ),
    "run": ([], {"--format": WORDS, "--poll-seconds": NUMBERS}),
}


def command_line(rng: random.Random, experiment: Path) -> list[str]:
    """A command with one to three flags at the ends of their ranges, beyond them, or given again."""
    command = rng.choice(("plan", "plan", "explain", "simulate", "simulate", "simulate", "run"))
    given, flags = COMMANDS[command]
    arguments = [command, *given, *([str(experiment)] if command == "run" else [])]
    wrong = [f"{flag}={rng.choice(flags[flag])}" for flag in rng.choices(list(flags), k=rng.choice((1, 1, 2, 3)))]
    return with_flags(arguments, *wrong)


@dataclass
class Tally:
    """What came of many cases: how many of each exit code, and the longest time of one with what it was."""

    codes: dict[int, int]
    seconds: float = 0.0
    slowest: str = ""

    def case(self, name: str, run: Callable[[], int]) -> None:
        started = time.perf_counter()
        try:
            code = run()
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
        took = time.perf_counter() - started
        self.codes[code] = self.codes.get(code, 0) + 1
        assert code in (0, 2), f"{name}: exit code {code}"
        if took > self.seconds:
            self.seconds, self.slowest = took, name[:300]


def mutate_files(seed: int, count: int, folder: Path) -> Tally:
    """Read `count` wrong files of every kind in turn."""
    rng, found, tally = random.Random(seed), kinds(), Tally({})
    for number in range(count):
        kind = found[number % len(found)]
        path = folder / f"{kind.name}.toml"
        path.write_bytes(content := mutated(rng, kind.text))
        tally.case(f"{kind.name} {number}: {content!r}", lambda kind=kind, path=path: kind.read(path))  # type: ignore[misc]
    return tally


def mutate_command_lines(seed: int, count: int, folder: Path) -> Tally:
    """Run `count` command lines."""
    rng, tally = random.Random(seed), Tally({})
    experiment = folder / "experiment.toml"
    experiment.write_text(EXPERIMENT)
    for number in range(count):
        arguments = command_line(rng, experiment)
        tally.case(f"{number}: {' '.join(arguments)}", lambda arguments=arguments: quiet(arguments))  # type: ignore[misc]
    return tally
