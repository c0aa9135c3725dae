"""The structure of the package: no circles, and the engine stands alone."""

from __future__ import annotations

from pathlib import Path

from tests.core.structure import circles, imports, rooms


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = imports()
    assert "partinf.engine.engine" in graph
    assert not circles(graph)
    assert not circles(rooms(graph))


def test_the_engine_knows_nothing_of_models_slices_and_costs() -> None:
    assert rooms(imports())["engine"] == {"errors", "limits", "rounding"}


def test_a_circle_is_found_also_through_others_and_through_imports_for_type_checkers(tmp_path: Path) -> None:
    folder = tmp_path / "box"
    (folder / "inner").mkdir(parents=True)
    files = {
        "__init__": "",
        "inner/__init__": "",
        "inner/a": "from box import b",
        "b": "def f():\n    import box.c",
        "d": "import box.b, os",
    }
    files["c"] = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from box.inner.a import A"
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    graph = imports(tmp_path, "box")
    assert graph["box.d"] == {"box.b"}
    assert circles(graph) == [["box.b", "box.c", "box.inner.a"]]
    assert rooms(graph)["inner"] == {"b"}
