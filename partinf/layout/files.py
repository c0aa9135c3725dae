"""Layouts as words: from plain strings, and from and to the files of `layouts/` and of saved plans.

What a layout is, is in `partinf.layout`; this reads and writes it, and refuses all that is wrong with it at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from partinf.foundation import documents, resources
from partinf.foundation.documents import Table
from partinf.foundation.errors import collect, nearest, raise_offences
from partinf.foundation.limits import MAX_AXES, MAX_SIZE, MAX_TOKENS
from partinf.layout import PHASES, AttentionRole, Dispatch, ExpertRole, Layout, Loop, Phase, Ring, Role
from partinf.workload import DType

_R = TypeVar("_R", bound=StrEnum)


def make_layout(
    storage: Mapping[str, str],
    decode_attention: Mapping[str, str],
    prefill_attention: Mapping[str, str] | None = None,
    decode_gather: Iterable[str] = (),
    prefill_gather: Iterable[str] = (),
    decode_loop: Mapping[str, Any] | None = None,
    prefill_loop: Mapping[str, Any] | None = None,
    decode_ahead: bool = False,
    prefill_ahead: bool = False,
    decode_whole: bool = False,
    prefill_whole: bool = False,
    decode_gather_experts: Iterable[str] = (),
    prefill_gather_experts: Iterable[str] = (),
    decode_dispatch: str = Dispatch.GATHER,
    prefill_dispatch: str = Dispatch.GATHER,
    experts: Mapping[str, str] | None = None,
) -> Layout:
    """A `Layout` from plain strings; prefill attends as decode does unless it is given. A loop is {"axis": …, "ring": …, "gathers": …}.

    Args:
        experts: axis → role for experts' matrices; None where every axis splits them as it splits the dense ones.

    Raises:
        InvalidInput: unknown role names, axes without a role, and everything else that `Layout` refuses, all at once.
    """
    offences: list[str] = []
    roles = tuple((axis, _role(Role, role, f"axis '{axis}'", offences)) for axis, role in storage.items())

    def attention(given: Mapping[str, str], label: str) -> tuple[tuple[str, AttentionRole], ...]:
        pairs = [(axis, _role(AttentionRole, role, f"{label} attention of '{axis}'", offences)) for axis, role in given.items()]
        order = {axis: index for index, axis in enumerate(storage)}
        return tuple(sorted(pairs, key=lambda pair: order.get(pair[0], len(order))))

    decode = attention(decode_attention, "decode")
    prefill = decode if prefill_attention is None else attention(prefill_attention, "prefill")
    loops = {"prefill": _loop(prefill_loop, "prefill", offences), "decode": _loop(decode_loop, "decode", offences)}
    order = list(storage)
    dispatches = [
        _role(Dispatch, given, f"{label} dispatch", offences)
        for given, label in ((prefill_dispatch, "prefill"), (decode_dispatch, "decode"))
    ]
    own = tuple((axis, _role(ExpertRole, role, f"experts: axis '{axis}'", offences)) for axis, role in (experts or {}).items())
    own = tuple(sorted(own, key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order)))

    def in_order(axes: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(axes, key=lambda axis: order.index(axis) if axis in order else len(order)))

    layout = Layout(
        roles,
        Phase(
            in_order(prefill_gather),
            prefill,
            loops["prefill"],
            prefill_ahead,
            prefill_whole,
            in_order(prefill_gather_experts),
            dispatches[0],
        ),
        Phase(in_order(decode_gather), decode, loops["decode"], decode_ahead, decode_whole, in_order(decode_gather_experts), dispatches[1]),
        check=False,
        experts=own,
    )
    raise_offences(offences + layout.offences())
    return layout


def _loop(given: Mapping[str, Any] | None, label: str, offences: list[str]) -> Loop | None:
    if given is None:
        return None
    known = ("axis", "ring", "gathers")
    offences += [f"{label} loop: unknown key '{key}'{nearest(key, known)}" for key in given if key not in known]
    if "axis" not in given:
        offences.append(f"{label} loop: `axis` is missing")
    gathers = given.get("gathers", True)
    if not isinstance(gathers, bool):
        offences.append(f"{label} loop: `gathers` is true or false, not {gathers!r}")
    return Loop(given.get("axis", ""), _role(Ring, given.get("ring", Ring.BOTH), f"{label} loop", offences), bool(gathers))


def _role(kind: type[_R], text: str, where: str, offences: list[str]) -> _R:
    try:
        return kind(text)
    except ValueError:
        offences.append(f"{where}: unknown role '{text}'{nearest(text, [role.value for role in kind])}")
        # What splits d_ff may be gathered and looped, so that no offence follows from this one.
        return kind("ffn") if kind in (Role, ExpertRole) else next(iter(kind))


def load_layout(name: str) -> Layout:
    """The layout named `name`: a shipped one, or a layout file, which a saved plan is too.

    Raises:
        InvalidInput: an unknown name (nearest one), or what is wrong with the file.
    """
    path = Path(name) if documents.is_file(name) or name.endswith(".toml") else resources.find("layouts", name)
    return layout_from_toml(documents.read_text(path, f"layout {path}", documents.TOML_BYTES), str(path))[0]


def layout_from_toml(text: str, where: str) -> tuple[Layout, dict[str, Any]]:
    """Read a layout file: its roles, and the rest of the file (description, constraints, predictions) as plain data of the right types.

    Raises:
        InvalidInput: unknown keys (nearest known key), missing tables, values of other types, wrong roles; all at once.
    """
    offences: list[str] = []
    file = Table(documents.toml_of(text, where), where, offences)
    axes = file.words("axes")
    experts = file.words("experts", default=None)
    decode = _phase(file.table("decode"))
    prefill = _phase(file.table("prefill")) if "prefill" in file else decode
    rest = _head(file)
    file.refuse_unknown()
    whole = axes and decode.attention is not None and prefill.attention is not None
    if whole and len(axes) > MAX_AXES:
        offences.append(f"{where}: {len(axes)} axes; a mesh has at most {MAX_AXES}")
    elif whole:
        collected: list[str] = []
        layout = collect(collected, lambda: _make(axes, decode, prefill, experts))
        offences += [f"{where}: {offence}" for offence in collected]
    elif "axes" in file and not axes:
        offences.append(f"{where}: [axes] is empty; a layout gives every axis of the mesh a role")
    raise_offences(offences)
    assert layout is not None
    return layout, rest


@dataclass(frozen=True)
class _PhaseTable:
    """What a file says of a phase, before its words are roles. No attention: it is missing or wrong, and an offence says so."""

    gather: tuple[str, ...]
    attention: Mapping[str, str] | None
    loop: Mapping[str, Any] | None
    ahead: bool
    whole: bool
    gather_experts: tuple[str, ...]
    dispatch: str


def _phase(table: Table) -> _PhaseTable:
    before = len(table.offences)
    attention = table.words("attention")
    right = len(table.offences) == before
    loop = table.table("loop", default=None)
    found = _PhaseTable(
        gather=table.texts("gather", default=()),
        attention=attention if right else None,
        loop=None if loop is None else _loop_table(loop),
        ahead=table.flag("ahead", default=False),
        whole=table.flag("whole", default=False),
        gather_experts=table.texts("gather_experts", default=()),
        dispatch=table.choice("dispatch", Dispatch, default=Dispatch.GATHER),
    )
    table.refuse_unknown()
    return found


def _loop_table(table: Table) -> dict[str, Any]:
    found = {
        "axis": table.text("axis"),
        "ring": table.choice("ring", Ring, default=Ring.BOTH),
        "gathers": table.flag("gathers", default=True),
    }
    table.refuse_unknown()
    return found


def _make(axes: Mapping[str, str], decode: _PhaseTable, prefill: _PhaseTable, experts: Mapping[str, str] | None) -> Layout:
    assert decode.attention is not None
    keys = ("gather", "loop", "ahead", "whole", "gather_experts", "dispatch")
    of_phases = {f"{label}_{key}": getattr(of, key) for key in keys for label, of in (("decode", decode), ("prefill", prefill))}
    prefill_attention = None if prefill is decode else prefill.attention
    return make_layout(axes, decode.attention, prefill_attention, experts=experts, **of_phases)


def _head(file: Table) -> dict[str, Any]:
    """What a layout file holds besides its roles, including what `plan --save` adds, checked."""
    read: dict[str, Callable[[str], Any]] = {
        **dict.fromkeys(("description", "source", "model", "slice", "mesh"), file.text),
        **dict.fromkeys(("weights", "kv"), lambda key: file.choice(key, DType)),
        "prefill_from_tokens": lambda key: file.whole(key, low=1, high=MAX_TOKENS),
        "padded_heads": lambda key: file.whole(key, high=MAX_SIZE),
        **dict.fromkeys(("chosen_for", "predicted"), lambda key: file.table(key).data),
    }
    return {key: read[key](key) for key in read if key in file}


def layout_to_toml(layout: Layout, head: str = "") -> str:
    """The `[axes]`, `[prefill]` and `[decode]` tables of a layout file, after `head` (top-level keys, already TOML)."""

    def table(pairs: Iterable[tuple[str, str]]) -> str:
        return "{ " + ", ".join(f'{axis} = "{role}"' for axis, role in pairs) + " }"

    lines = [head.rstrip() + "\n"] if head else []
    lines += ["[axes]"] + [f'{axis} = "{role}"' for axis, role in layout.storage]
    if layout.experts:
        lines += ["", "[experts]"] + [f'{axis} = "{role}"' for axis, role in layout.experts]
    for label in PHASES:
        phase = layout.phase(label)
        gather = ", ".join(f'"{axis}"' for axis in phase.gather)
        lines += ["", f"[{label}]", f"gather = [{gather}]", f"attention = {table(phase.attention)}"]
        if phase.loop is not None:
            gathers = "" if phase.loop.gathers else ", gathers = false"
            lines.append(f'loop = {{ axis = "{phase.loop.axis}", ring = "{phase.loop.ring}"{gathers} }}')
        if phase.ahead:
            lines.append("ahead = true")
        if phase.whole:
            lines.append("whole = true")
        if phase.gather_experts:
            lines.append(f"gather_experts = [{', '.join(json.dumps(axis) for axis in phase.gather_experts)}]")
        if phase.dispatch is not Dispatch.GATHER:
            lines.append(f'dispatch = "{phase.dispatch}"')
    return "\n".join(lines) + "\n"
