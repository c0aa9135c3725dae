"""Shipped data files are found by name, wherever the package lives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a package, two models of which one has weights, and no layouts."""
    (tmp_path / "partinf").mkdir()
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").write_text("{}")
    (tmp_path / "models" / "llama-1b.toml").write_text("")
    (tmp_path / "models" / "qwen2.5-7b.toml").write_text("")
    (tmp_path / "models" / "notes").mkdir()
    (tmp_path / "models" / "README.md").write_text("")
    monkeypatch.setattr(resources, "_package", lambda: tmp_path / "partinf")
    return tmp_path


def test_checkout_uses_the_top_level_folders(checkout: Path) -> None:
    assert resources.names("models") == ["llama-1b", "qwen2.5-7b", "tiny"]
    assert resources.find("models", "llama-1b") == checkout / "models" / "llama-1b.toml"
    assert resources.find("models", "qwen2.5-7b") == checkout / "models" / "qwen2.5-7b.toml"
    assert resources.find("models", "tiny") == checkout / "models" / "tiny"


def test_a_folder_that_does_not_exist_is_empty(checkout: Path) -> None:
    assert resources.names("layouts") == []


def test_a_wheel_carries_its_own_copies(checkout: Path) -> None:
    shipped = checkout / "partinf" / "_data" / "layouts"
    shipped.mkdir(parents=True)
    (shipped / "wide.toml").write_text("")
    (checkout / "layouts").mkdir()
    (checkout / "layouts" / "narrow.toml").write_text("")
    assert resources.names("layouts") == ["wide"]
    assert resources.find("layouts", "wide") == shipped / "wide.toml"


def test_a_folder_with_weights_wins_over_a_file(checkout: Path) -> None:
    (checkout / "models" / "tiny.toml").write_text("")
    assert resources.names("models") == ["llama-1b", "qwen2.5-7b", "tiny"]
    assert resources.find("models", "tiny").is_dir()


def test_only_models_may_be_folders(checkout: Path) -> None:
    (checkout / "layouts" / "wide").mkdir(parents=True)
    (checkout / "layouts" / "wide" / "config.json").write_text("{}")
    assert resources.names("layouts") == []


@pytest.mark.parametrize(
    "name,message",
    [
        ("lama-1b", "unknown model 'lama-1b'; did you mean 'llama-1b'?"),
        ("zzz", "unknown model 'zzz'; known: llama-1b, qwen2.5-7b, tiny"),
        ("../models/tiny", "unknown model '../models/tiny'"),
        ("", "unknown model ''; known: "),
    ],
)
def test_unknown_names_are_bad_input(checkout: Path, name: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        resources.find("models", name)
    (offence,) = caught.value.offences
    assert offence.startswith(message)


def test_package_file_finds_what_lives_inside_the_package() -> None:
    assert resources.package_file("foundation/resources.py").read_text() == Path(resources.__file__).read_text()
    with pytest.raises(FileNotFoundError, match=r"nothing\.toml is missing from the installed package"):
        resources.package_file("nothing.toml")


@pytest.mark.parametrize("kind", ["models", "layouts"])
def test_every_shipped_name_is_found(kind: resources.Kind) -> None:
    for name in resources.names(kind):
        assert resources.find(kind, name).exists()


def test_a_process_that_is_started_finds_this_package_first(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert resources.python_path() == str(checkout)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert resources.python_path() == os.pathsep.join([str(checkout), "elsewhere"])
