"""No files import each other in a circle, and the rooms of the house do not grow together."""

from __future__ import annotations

from pathlib import Path

from tests.core.rooms import circles_of, read_house

# A ceiling, to be lowered (`python -m tests.core.rooms --arrows`): whoever needs one more asks first whether the import belongs there, and
# whoever takes some away writes down the smaller number.
MOST_ARROWS = 185


def test_no_files_and_no_rooms_import_each_other_in_a_circle() -> None:
    house = read_house()
    assert house.circles == ()
    assert "partinf/engine/engine.py" in house.files
    rooms = {room: [to for fro, to in house.arrows if fro == room != "partinf/__init__.py"] for room in house.rooms}
    assert circles_of(rooms) == ()


def test_the_engine_knows_nothing_of_models_slices_and_costs() -> None:
    house = read_house()
    wanted = {other for (room, _), pairs in house.arrows.items() if room == "partinf/engine" for _, other in pairs}
    assert wanted == {f"partinf/foundation/{name}.py" for name in ("errors", "limits", "paging", "rounding")}


def test_arrows_between_rooms_do_not_grow() -> None:
    assert len(read_house().arrows) <= MOST_ARROWS


def test_rooms_arrows_and_circles_of_a_small_house(tmp_path: Path) -> None:
    """Imports for type checkers and inside functions count; scripts import by bare names; the package's own face closes no circle."""
    for name, text in {
        "partinf/__init__.py": "from partinf.b import x\n",
        "partinf/a.py": "from partinf import b\nimport os\n",
        "partinf/b.py": "from partinf.c.one import x\n",
        "partinf/c/__init__.py": "",
        "partinf/c/one.py": "from partinf.c import two\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from partinf.a import y\n",
        "partinf/c/two.py": "import partinf\ndef f():\n    from partinf.c.one import z\n",
        "tpu_scripts/pod.py": "import pod_life\nimport partinf.c\n",
        "tpu_scripts/pod_life.py": "",
        "experiments/first/measure.py": "from partinf.c import two, three\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    house = read_house(tmp_path)
    assert house.rooms == ("experiments", "partinf/__init__.py", "partinf/a.py", "partinf/b.py", "partinf/c", "tpu_scripts")
    assert set(house.arrows) == {
        ("partinf/__init__.py", "partinf/b.py"),
        ("partinf/a.py", "partinf/b.py"),
        ("partinf/c", "partinf/__init__.py"),
        ("partinf/b.py", "partinf/c"),
        ("partinf/c", "partinf/a.py"),
        ("tpu_scripts", "partinf/c"),
        ("experiments", "partinf/c"),
    }
    assert house.circles == (("partinf/a.py", "partinf/b.py", "partinf/c/one.py", "partinf/c/two.py"),)
