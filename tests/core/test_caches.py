"""One variable says where every cache lies; a cache that cannot be used is a warning and never a failure."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from partinf.cli import devices
from partinf.foundation import caches
from partinf.foundation.errors import InvalidInput

KINDS = (caches.EXECUTABLES, caches.XLA, caches.NATIVE)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of this process, and all that is set is put back; warnings come again."""
    for name in ("PARTINF_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
    monkeypatch.setattr(caches, "_warned", [])


def test_caches_lie_in_the_users_own_directory_or_in_the_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [caches.cache_directory(kind) for kind in KINDS] == [tmp_path / "users" / "partinf" / kind for kind in KINDS]
    named = tmp_path / "named"
    monkeypatch.setenv("PARTINF_CACHE_DIR", str(named))
    assert [caches.cache_directory(kind) for kind in KINDS] == [named, named / "xla", named / "native"]
    assert not named.exists()
    assert caches.usable("xla") == named / "xla"
    assert named.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("PARTINF_CACHE_DIR", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert caches.cache_directory("xla") == tmp_path / "mine" / "xla"


@pytest.mark.parametrize("off", ["off", "OFF", " off "])
def test_off_keeps_nothing(off: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTINF_CACHE_DIR", off)
    assert [caches.usable(kind) for kind in KINDS] == [None] * 3
    devices.prepare(virtual_devices=1)
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_tells_jax_the_same_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTINF_CACHE_DIR", str(tmp_path / "named"))
    devices.prepare(virtual_devices=1)
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "named" / "xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "what the user says")
    devices.prepare(virtual_devices=1)
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "what the user says"


@pytest.mark.parametrize("fault", ["a file", "below a file", "others may write"])
def test_a_directory_that_cannot_be_used_is_one_warning(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "place"
    if fault == "others may write":
        place.mkdir()
        place.chmod(0o777)
    else:
        place.touch()
    monkeypatch.setenv("PARTINF_CACHE_DIR", str(place / "below" if fault == "below a file" else place))
    with caplog.at_level(logging.WARNING):
        assert [caches.usable(kind) for kind in (*KINDS, *KINDS)] == [None] * 6
    (line,) = caplog.messages
    assert "nothing is kept for the next start" in line
    with pytest.raises(InvalidInput, match="cache "):
        caches.private_directory(place / "below" if fault == "below a file" else place)


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert caches.usable("xla") is None


def test_jax_gets_no_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would warn of every program."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    devices.prepare(virtual_devices=1)
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
