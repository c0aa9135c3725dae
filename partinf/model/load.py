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
from partinf.model.families import family_offences
from partinf.model.hf_config import config_from_hf
from partinf.model.kinds import Kind, NormPlaces, QkNorm
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
    values["kinds"] = _kinds(table, values["window"], values["rotation"])
    table.refuse_unknown()
    raise_offences(offences)
    config = ModelConfig(name=name, **values)
    if config.family:
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
    if field.name in _ORDER:
        return _order(table, field.name)
    read = {"int": table.whole, "float": table.number, "bool": table.flag, "str": table.text}[str(field.type)]
    return read(field.name, **default)


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
        found.append(Kind(name, own.whole("window", default=window), turned))
        own.refuse_unknown()
    return tuple(found)


def config_to_toml(config: ModelConfig) -> str:
    """The inverse of `config_from_toml`, defaults left out."""
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    lines = []
    for key in defaults:
        value = getattr(config, key)
        if key in ("name", "kinds") or value == defaults[key]:
            continue
        if key in _ORDER:
            counts = ((name, len(list(group))) for name, group in itertools.groupby(value))
            value = ", ".join(f"{count} {name}" for name, count in counts)
        if isinstance(value, Rotation):
            lines.append(f"{key} = {_inline(value)}")
        else:
            lines.append(f"{key} = {json.dumps(value == MATRICES or value if key == 'biases' else value)}")
    for kind in config.kinds:
        lines += ["", f"[kinds.{json.dumps(kind.name)}]", f"window = {kind.window}"]
        lines.append(f"rotation = {'false' if kind.rotation is None else _inline(kind.rotation)}")
    return "\n".join(lines) + "\n"


def _inline(rotation: Rotation) -> str:
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in rotation_to(rotation).items()) + " }"
