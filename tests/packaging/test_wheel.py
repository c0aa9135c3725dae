"""A wheel, one built from the source distribution and an editable install carry the models, layouts and C++ of the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from typing import Any

import pytest

_LIST = """
import json, os
from pathlib import Path
from partinf.foundation import resources
found = {}
for kind in ("models", "layouts"):
    for name in resources.names(kind):
        path = resources.find(kind, name)
        found[f"{kind}/{name}"] = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.name
package = Path(resources.__file__).parent
found["C++"] = sorted(str(p.relative_to(package)) for p in package.rglob("*") if p.suffix in (".cc", ".h"))
print(json.dumps(found))
"""


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _build(hook: str, source: Path, target: Path) -> Path:
    """Call hatchling as a build front end does, in this environment: no network."""
    code = f"import sys; from hatchling import build; print(build.{hook}(sys.argv[1]))"
    return target / _run(sys.executable, "-c", code, target, cwd=source).split()[-1]


def _listing_after_install(wheel: Path, folder: Path) -> dict[str, object]:
    environment = folder / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    _run(
        sys.executable,
        *("-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    return json.loads(_run(python, "-I", "-c", _LIST, cwd=folder))


@pytest.mark.parametrize("how", ["wheel", "wheel from sdist", "editable"])
def test_installed_data_is_the_checkouts(how: str, tmp_path: Path, root: Path) -> None:
    expected = json.loads(_run(sys.executable, "-c", _LIST, cwd=tmp_path, PYTHONPATH=str(root)))
    if how == "editable":
        wheel = _build("build_editable", root, tmp_path)
    elif how == "wheel":
        wheel = _build("build_wheel", root, tmp_path)
    else:
        safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
        with tarfile.open(_build("build_sdist", root, tmp_path)) as archive:
            archive.extractall(tmp_path / "source", **safely)
        (source,) = (tmp_path / "source").iterdir()
        wheel = _build("build_wheel", source, tmp_path)
    assert _listing_after_install(wheel, tmp_path) == expected
    assert expected
