"""Threads for slow grammars: one, two where there are cores for them, or as many as were requested."""

from __future__ import annotations

import pytest

from partinf.cli import main, serve
from partinf.cli.served_engine import ServedEngine
from partinf.engine import FakeRunner
from partinf.engine.estimates import Estimates
from tests.cli.test_saved_plan import flags_of
from tests.serve.support import LIMITS


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (4, 2), (64, 2)])
def test_there_is_a_thread_for_masks_and_a_second_one_has_a_core_of_its_own(
    cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    served = ServedEngine.read(flags_of(serve, "--model", "demo"))
    assert served.mask_threads == threads
    assert served.engine(FakeRunner(LIMITS), Estimates(lambda tokens: 1e-3, 1e-3))._workers._num_threads == threads
    for count in (0, 1, 3):
        assert ServedEngine.read(flags_of(serve, "--model", "demo", "--mask-threads", str(count))).mask_threads == count


def test_a_wrong_number_of_threads_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "demo", "--mask-threads", "65"]) == 2
    assert "--mask-threads 65" in capsys.readouterr().err
