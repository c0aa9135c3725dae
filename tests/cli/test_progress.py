"""What is reported of progress where standard error is no terminal: nothing of what is quick, a line now and then of what is not."""

from __future__ import annotations

import pytest

from partinf.cli import progress
from partinf.cli.progress import progress_bar


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("serving", 3) as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr() == ("", "")


def test_what_takes_long_has_a_line_every_few_seconds_and_one_at_its_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar("serving", 9) as advance:
        for _ in range(8):
            now[0] += 2
            advance(1)
        advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["serving: 3 of 9 after 6 s", "serving: 6 of 9 after 12 s", "serving: 9 of 9 after 16 s"]
