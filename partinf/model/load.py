"""Architectures by name: read from `models/<name>.toml`, or from the `config.json` of a Hugging Face directory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from partinf.foundation import documents, resources
from partinf.foundation.documents import Table, shown
from partinf.foundation.errors import InvalidInput, raise_offences
from partinf.model.config import MATRICES, MOST_LAYERS, Activation, Block, ModelConfig, Norm, Position
from partinf.model.kinds import Experts, FeedForward, Kind, NormPlaces, QkNorm, Router, Score, unknown_kinds
from partinf.model.rotation import PLAIN, Rotation, rotation_from, rotation_to

_CONFIG_BYTES = 4 << 20  # of a config.json


def load_model_config(name: str | Path) -> ModelConfig:
    """The architecture named `name`: a shipped model, a `.toml` file, or a directory with a Hugging Face `config.json`.

    Raises:
        InvalidInput: an unknown name (nearest one), a directory without config.json, or what the readers below refuse.
    """
    path = Path(name)
    if not documents.is_file(path) and not documents.is_directory(path):
        path = Path(str(resources.find("models", str(name))))
    if path.is_dir():
        file = path / "config.json"
        if not file.exists() and not file.is_symlink():
            adapter = (path / "adapter_config.json").exists()
            needed = "a Hugging Face model directory or a .toml file is needed"
            why = "it holds an adapter alone; merge that into its base model" if adapter else needed
            raise InvalidInput(f"{path}: no config.json in this directory; {why}")
        data = documents.read_json(file, most=_CONFIG_BYTES)
        if not isinstance(data, dict):
            raise InvalidInput(f"{file}: expected a JSON object, found {type(data).__name__}")
        from partinf.model.hf_config import config_from_hf  # that and families are imported where they are needed

        return config_from_hf(data, path.resolve().name)
    return config_from_toml(documents.read_text(path, f"model {path}", documents.TOML_BYTES), path.stem)


def config_from_toml(text: str, name: str) -> ModelConfig:
    """Read a `models/*.toml` file.

    Raises:
        InvalidInput: unknown keys (nearest known one), missing keys, wrong types or values; all at once.
    """
    offences: list[str] = []
    where = f"model {name}"
    table = Table(documents.toml_of(text, where), where, offences)
    values = {field.name: _value(table, field) for field in fields(ModelConfig) if field.name not in ("name", "kinds")}
    values["kinds"] = kinds = _kinds(table, values["window"], values["rotation"])
    table.refuse_unknown()
    offences += [f"{where}: {line}" for line in unknown_kinds([kind.name for kind in kinds], *(values[key] for key in _ORDER))]
    raise_offences(offences)
    config = ModelConfig(name=name, **values)
    if config.family:
        from partinf.model.families import family_offences

        raise_offences(family_offences(config))
    return config


_ENUMS: Mapping[str, type[StrEnum]] = {
    "block": Block,
    "norm": Norm,
    "norms": NormPlaces,
    "qk_norm": QkNorm,
    "position": Position,
    "activation": Activation,
}
_ORDER = ("prefix", "pattern")


def _value(table: Table, field: Field[Any]) -> Any:
    """A field of a configuration from its key in a file, by the field's type."""
    default = {} if field.default is MISSING else {"default": field.default}
    if field.name in _ENUMS:
        return table.choice(field.name, _ENUMS[field.name], **default)
    if field.name == "biases":
        return table.subset(field.name, MATRICES, **default)
    if field.name == "rotation":
        rotation = table.table(field.name, default=None)
        return PLAIN if rotation is None else rotation_from(rotation)
    if field.name == "experts":
        experts = table.table(field.name, default=None)
        return None if experts is None else _experts(experts)
    if field.name in _ORDER:
        return _order(table, field.name)
    read = {"int": table.whole, "float": table.number, "bool": table.flag, "str": table.text}[str(field.type)]
    return read(field.name, **default)


def _experts(table: Table) -> Experts:
    """The table `[experts]`; its router is a table within it."""
    inner = ("w_in", "w_out")
    each = FeedForward(
        width=table.whole("width"),
        gated=table.flag("gated", default=True),
        activation=table.choice("activation", Activation, default=Activation.SILU),
        biases=table.subset("biases", inner, default=()),
        clamp=table.number("clamp", default=0.0),
        up_offset=table.number("up_offset", default=0.0),
    )
    count, per_token = table.whole("count"), table.whole("per_token")
    shared, gate = table.whole("shared", default=0), table.flag("shared_gate", default=False)
    router = table.table("router", default=None)
    table.refuse_unknown()
    return Experts(count, per_token, each, Router() if router is None else _router(router), shared, gate)


def _router(table: Table) -> Router:
    usual = Router()
    found = Router(
        score=table.choice("score", Score, default=usual.score),
        renormalised=table.flag("renormalised", default=usual.renormalised),
        scale=table.number("scale", default=usual.scale),
        bias=table.flag("bias", default=usual.bias),
        correction=table.flag("correction", default=usual.correction),
        groups=table.whole("groups", default=usual.groups),
        chosen_groups=table.whole("chosen_groups", default=usual.chosen_groups),
        group_by_greatest=table.flag("group_by_greatest", default=usual.group_by_greatest),
    )
    table.refuse_unknown()
    return found


def _order(table: Table, key: str) -> tuple[str, ...]:
    """Names of kinds as `5 local, 1 global` lists them: a count before a name repeats it."""
    names: list[str] = []
    for part in filter(None, (part.strip() for part in table.text(key, default="").split(","))):
        count, _, name = part.rpartition(" ")
        if count and not (count.isdecimal() and len(count) < 5):
            table.offences.append(f"{table.where}: {key}: {shown(part)}; names of kinds are needed, with a number before one that repeats")
        else:
            names += [name] * min(int(count or 1), MOST_LAYERS + 1 - len(names))  # more are refused all the same
    return tuple(names)


def _kinds(table: Table, window: int, rotation: Rotation) -> tuple[Kind, ...]:
    """The tables `[kinds.NAME]`; what one lacks is the model's, and `rotation = false` is none."""
    within = table.table("kinds", default=None)
    found = []
    for name in within.data if within is not None else ():
        own = within.table(name)
        given = own.flag("rotation") if isinstance(own.data.get("rotation"), bool) else own.table("rotation", default=None)
        turned = rotation_from(given) if isinstance(given, Table) else None if given is False else rotation
        found.append(Kind(name, own.whole("window", default=window), turned, own.flag("experts", default=True)))
        own.refuse_unknown()
    return tuple(found)


def config_to_toml(config: ModelConfig) -> str:
    """The inverse of `config_from_toml`, defaults left out."""
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    lines = []
    for key in defaults:
        value = getattr(config, key)
        if key in ("name", "kinds", "experts") or value == defaults[key]:
            continue
        if key in _ORDER:
            counts = ((name, len(list(group))) for name, group in itertools.groupby(value))
            value = ", ".join(f"{count} {name}" for name, count in counts)
        if isinstance(value, Rotation):
            lines.append(f"{key} = {_inline(value)}")
        else:
            lines.append(f"{key} = {json.dumps(value == MATRICES or value if key == 'biases' else value)}")
    if config.experts is not None:
        lines += _experts_lines(config.experts)
    for kind in config.kinds:
        lines += ["", f"[kinds.{json.dumps(kind.name)}]", f"window = {kind.window}"]
        lines.append(f"rotation = {'false' if kind.rotation is None else _inline(kind.rotation)}")
        lines += [] if kind.experts else ["experts = false"]
    return "\n".join(lines) + "\n"


def _experts_lines(of: Experts) -> list[str]:
    """The table `[experts]`, defaults left out."""
    usual = Experts(of.count, of.per_token, FeedForward(of.each.width, True, Activation.SILU, ()))
    lines = ["", "[experts]", f"count = {of.count}", f"per_token = {of.per_token}", f"width = {of.each.width}"]
    for own, default, skipped in ((of.each, usual.each, ("width",)), (of, usual, ("count", "per_token", "each", "router"))):
        keys = (field.name for field in fields(own) if field.name not in skipped)
        lines += [f"{key} = {json.dumps(getattr(own, key))}" for key in keys if getattr(own, key) != getattr(default, key)]
    router = {field.name: getattr(of.router, field.name) for field in fields(Router)}
    given = ", ".join(f"{key} = {json.dumps(value)}" for key, value in router.items() if value != getattr(usual.router, key))
    return lines + ([f"router = {{ {given} }}"] if given else [])


def _inline(rotation: Rotation) -> str:
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in rotation_to(rotation).items()) + " }"
