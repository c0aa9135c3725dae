"""The files in layouts/ are what their command writes today."""

from __future__ import annotations

from experiments.shipped_layouts.regenerate import CHOSEN, LAYOUTS, texts
from partinf.foundation import resources
from partinf.planner.files import plan_from_toml


def test_no_layout_has_drifted() -> None:
    written = texts()
    assert set(written) == set(resources.names("layouts"))
    for name, text in written.items():
        assert (LAYOUTS / f"{name}.toml").read_text() == text, name


def test_chosen_layouts_are_plans() -> None:
    for name, chosen in CHOSEN.items():
        plan = plan_from_toml((LAYOUTS / f"{name}.toml").read_text(), name)
        assert (plan.model.name, plan.slice.name, plan.weights) == (chosen.model, chosen.slice, chosen.workload.weights)
        assert plan.runnable is None
