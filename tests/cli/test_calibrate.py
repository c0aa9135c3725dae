"""`partinf calibrate`'s flags, and its file on the command lines of those that plan."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from partinf.cli import main
from partinf.cost.ledger import Op
from partinf.hardware.chips import chips
from partinf.hardware.hardware_file import default_path, read_hardware, write_hardware
from partinf.hardware.platform import Form
from partinf.hardware.rates import CollectiveRate, Curve, Rates, TypeRates
from partinf.transformer.kernels import choices
from partinf.transformer.kernels.turns import Measured, Times

WORKLOAD = ["--model", "demo", "--weights", "f32", "--kv", "f32"]


@pytest.fixture
def hardware(tmp_path: Path) -> Path:
    """A measured CPU of eight devices."""
    rates = Rates(
        products=(("f32", Curve((1.0, 64.0), (1e9, 1e10))),),
        memory=2e9,
        types=(("f32", TypeRates(1e9, 2e9, 4e9, 1e9, 1e8, 2e-5, 1e-3)),),
        collectives=tuple(CollectiveRate(op.value, 8, 1e-4, 1.0) for op in Op),
        devices=8,
        device_kind="cpu",
        date="2026-01-02",
        jax="0.0",
        error=0.1,
    )
    file = tmp_path / "my cpu.toml"
    file.write_text(write_hardware(replace(chips()["cpu"], rates=rates)))
    return file


@pytest.fixture
def measured(hardware: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Measuring takes no time and finds that chip, with rates that were too fast to tell; the place of the user's own file."""
    from partinf.measure import calibrate
    from partinf.measure.timing import Timing

    chip = read_hardware(hardware)
    fast = TypeRates(math.inf, 2e9, math.inf, 1e9, math.inf, 2e-5, 1e-3)
    rates = replace(chip.rates, types=(("f32", fast),), spread=(("a", 0.01), ("b", 0.02), ("c", 0.5)))
    rates = replace(rates, collectives=tuple(replace(rate, factor=0.0) for rate in rates.collectives))
    probe = SimpleNamespace(name="a step", timing=Timing(1e-3, 0.02, 5))
    monkeypatch.setattr(calibrate, "calibrate", lambda *_: (replace(chip, rates=rates), [probe]))
    monkeypatch.setattr(calibrate, "predicted_seconds", lambda *_: [2e-3])
    monkeypatch.setattr("partinf.cli.devices.prepare", lambda *_, **__: None)
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return default_path("cpu", 8)


def asked_on_a_terminal(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """Standard input is a terminal with this input."""
    stdin = io.StringIO(answer)
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", stdin)


@pytest.mark.parametrize(("answer", "written"), [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_later_plans_change_only_if_the_user_agrees(
    measured: Path, answer: str, written: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked_on_a_terminal(monkeypatch, answer)
    assert main(["calibrate"]) == 0
    found = capsys.readouterr()
    assert f"Write {measured}? [y/N]" in found.err
    assert measured.exists() == written
    assert ("Slice local uses it from now on" if written else "Nothing was written") in found.out


def test_without_a_terminal_calibrate_wants_a_flag(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["calibrate"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--yes" in line
    assert "--output FILE" in line
    assert main(["calibrate", "--output", str(tmp_path / "elsewhere.toml")]) == 0
    assert (tmp_path / "elsewhere.toml").exists()
    assert not measured.exists()
    assert main(["calibrate", "--yes"]) == 0
    assert measured.exists()
    asked_on_a_terminal(monkeypatch, "n\n")
    assert main(["calibrate"]) == 0
    assert "in place of what was measured before" in capsys.readouterr().err


def test_no_figure_is_infinite(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--yes"]) == 0
    text = capsys.readouterr().out
    assert not re.search(r"\b(inf|nan)\b", text)
    assert "decode attention too fast to measure of KV and 2 GFLOP/s" in text
    assert "no measurable time for its bytes" in text
    assert main(["calibrate", "--yes", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (found["file"], found["rates"]["types"][0][1]["decode_kv"]) == (str(measured), None)
    assert read_hardware(measured).rates.type("f32").decode_kv == math.inf  # what was measured is kept as it is


def test_a_busy_machine_and_unsteady_times_are_reported(
    measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--yes"]) == 0
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr("os.getloadavg", lambda: (1.3, 0.1, 0.1))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("partinf.cli.calibrate._UNSTEADY", 0.015)
    assert main(["calibrate", "--yes"]) == 0
    busy, unsteady = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "1.3 processes were running on 4 cores" in busy
    assert "vary by ±2% in the median" in unsteady
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("partinf.cli.calibrate._UNSTEADY", 0.1)
    assert main(["calibrate", "--yes"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_every_wrong_flag_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--types", "f16,int8", "--devices", "many", "--seconds", "0", "--format", "xml", "--output", str(tmp_path / "none" / "x.toml")]
    assert main(["calibrate", *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    for expected in ("'f16' is no type", "measure bf16 too", "--devices many", "--seconds 0", "--format xml", "there is no directory"):
        assert any(expected in line for line in lines), expected
    assert len(lines) == 6


def test_plan_and_simulate_use_a_hardware_file_and_say_so(hardware: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--slice", "cpu:2x2x2", "--hardware", str(hardware)]
    assert main(["plan", *WORKLOAD, *where, "--phase", "decode", "--batch", "8", "--context", "64", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["calibration"]["measured"]
    assert "partinf calibrate on 2026-01-02: 8 × cpu" in plan["calibration"]["source"]
    assert plan["best"]["step_seconds"] > 1e-3  # what a step takes in addition to all else
    assert main(["plan", *WORKLOAD, *where, "--phase", "decode", "--batch", "8", "--context", "64"]) == 0
    assert "measured with partinf calibrate on 2026-01-02" in capsys.readouterr().out.replace("\n", " ")
    assert main(["simulate", *WORKLOAD, *where, "--requests", "4", "--lengths", "fixed:8:4", "--format", "json"]) == 0
    assert "partinf calibrate" in json.loads(capsys.readouterr().out)["calibration_source"]


@pytest.mark.parametrize(
    "slice_, offence",
    [("v4:2x2x2", "is of cpu, slice v4:2x2x2 of v4"), ("cpu:4", "8 devices, which share one CPU; the slice has 4"), ("auto:cpu", "auto")],
)
def test_a_hardware_file_of_other_devices_is_refused(hardware: Path, capsys: pytest.CaptureFixture[str], slice_: str, offence: str) -> None:
    flags = ["--slice", slice_, "--hardware", str(hardware), "--phase", "decode", "--context", "64", "--max-latency-ms", "50"]
    assert main(["plan", *WORKLOAD, *flags]) == 2
    assert offence in capsys.readouterr().err


def test_the_forms_of_products_are_shown_with_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = (Times("f32", Form.XLA, ((1, 2e-3), (4, 3e-3))), Times("f32", Form.ROWS, ((1, 1e-3),)))
    found = choices.Choices((("f32", ((3, Form.ROWS), (512, Form.XLA))), ("bf16", ((4, Form.XLA),))), times, ("bf16",), 0.61)
    monkeypatch.setattr(choices, "_current", [found])
    assert main(["calibrate", "--products", "show"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in (
        "f32 rows up to 3, xla beyond",
        "f32 xla 2e+03 3e+03",
        "f32 rows 1e+03",
        "Times of bf16 did not settle",
        "took 61% of the machine",
    ):
        assert part in printed
    measured = Measured(tuple(replace(each, kind=kind) for each in times for kind in ("f32", "bf16", "int8")))
    monkeypatch.setattr(choices, "take_turns", lambda: measured)
    assert main(["calibrate", "--products", "again", "--format", "json"]) == 0
    again = choices.from_json(capsys.readouterr().out)
    assert choices.current() == again
    assert not again.unsettled
    assert main(["calibrate", "--products", "agian"]) == 2
    assert "--products agian: valid: show, again; did you mean 'again'?" in capsys.readouterr().err
