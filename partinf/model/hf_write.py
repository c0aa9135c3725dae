"""Hugging Face `config.json`, written for every family of `families` as far as its keys can say what a model is.

Nothing is written that would be misread: a file counts only where `hf_config` reads it as the same model. So a declaration says once what
its keys mean, and where several keys decide together the values that mean the model are found by trying.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from partinf.foundation.errors import InvalidInput
from partinf.model.config import ModelConfig
from partinf.model.families import FAMILIES, family_of
from partinf.model.family import Family, Pick, Scalar, Window
from partinf.model.hf_config import config_from_hf, rotation_of
from partinf.model.hf_experts import experts_to_hf
from partinf.model.hf_file import as_written
from partinf.model.hf_rope import rope_to_hf, ropes_to_hf
from partinf.model.kinds import Attention, Kind


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that both transformers 4 and 5 read, of the model's own family or of the first that has such blocks.

    Raises:
        InvalidInput: blocks that no family has, or something about them that the family's keys cannot say.
    """
    own = family_of(config)
    others = (family for family in FAMILIES.values() if family is not own and not family.differences(config))
    for family in (own, *others):
        for data in _files(config, family):
            if not _misread(config, data):
                return data
    misread = _misread(config, next(_files(config, own)))
    raise InvalidInput(f"model {config.name}: the config.json of a {own.title} model cannot say that {misread}; save with orbax")


def _misread(config: ModelConfig, data: Mapping[str, Any]) -> str:
    """What of a model a file does not say, in words; empty where it is read as the same model."""
    try:
        found = config_from_hf(data, config.name)
    except InvalidInput as error:
        return error.offences[0]
    found = replace(found, source=config.source, family=config.family)
    wrong = [key for key, value in vars(found).items() if key in ModelConfig.__dataclass_fields__ and value != getattr(config, key)]
    return ", ".join(f"{key} = {_shown(getattr(config, key))}" for key in wrong)


def _shown(value: Any) -> str:
    """A feature in a message; kinds of layers by their names."""
    return as_written([one.name if isinstance(one, Kind) else one for one in value] if isinstance(value, tuple) else value)


def _files(config: ModelConfig, family: Family) -> Iterator[dict[str, Any]]:
    """The files that may mean a model, in the family's keys."""
    data: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    data |= {size.key: (getattr(config, field) or None) if size.follows else getattr(config, field) for field, size in family.sizes.items()}
    data |= {key: values[0] for key, values in family.only.items()}
    data |= {"tie_word_embeddings": config.tied_embeddings, "pad_token_id": None}  # which some families' defaults put beyond small tables
    data |= {family.norm_eps[0]: config.norm_eps} if family.norm_eps[0] else {}
    data |= {bias.key: {*bias.matrices} <= {*config.biases} for bias in family.biases}
    data |= {scalar.key: _number(scalar, getattr(config, scalar.field)) for scalar in family.scalars}
    layers = [config.layer_kinds[number].attention for number in config.kind_of_layers]
    if family.window is not None:
        data |= _window_to_hf(layers, family.window)
    if family.mixture is not None and config.experts is not None:
        mixed = [config.layer_kinds[number].experts is not None for number in config.kind_of_layers]
        data |= experts_to_hf(family.mixture, config.experts, mixed)
    if family.rotates:
        data |= _rotations_to_hf(config, family, layers)
    for values in itertools.product(*(_values(pick, config) for pick in family.picks)):
        yield data | dict(zip((pick.key for pick in family.picks), values, strict=True))


def _values(pick: Pick, config: ModelConfig) -> list[Any]:
    """The values of a key that may mean a model: one where they decide fields of the model alone, and the default first."""
    alone = all(not field.startswith("_") for _, chosen in pick.values for field in chosen)
    right = [one for one, chosen in pick.values if all(getattr(config, field) == want for field, want in chosen.items() if field[0] != "_")]
    right.sort(key=lambda one: one != pick.absent)
    if alone:
        return right[:1] or [pick.absent]
    return [one for one, _ in pick.values]


def _number(scalar: Scalar, value: float) -> float | None:
    """The number that means a field's value, among those about its inverse; null for a value of 0, which is none."""
    if not value:
        return None
    about = scalar.back(value)
    tried = (about, round(about, 6), math.nextafter(about, math.inf), math.nextafter(about, 0.0))
    return next((one for one in tried if one and scalar.of(one) == value), about)


def _window_to_hf(layers: Sequence[Attention], of: Window) -> dict[str, Any]:
    """The keys that say which layers have a window, and which do not rotate."""
    slides = [layer.window > 0 for layer in layers]
    window = max(layer.window for layer in layers)
    data: dict[str, Any] = {of.key: window or (of.absent if of.listed[0] else None)}
    data |= {of.flag: window > 0} if of.flag else {}
    data |= {of.first[0]: slides.index(True) if window else len(layers)} if of.first[0] else {}
    if of.typed and window:
        data["layer_types"] = ["sliding_attention" if one else "full_attention" for one in slides]
    if of.listed[0]:
        names = ["local" if one else "global" for one in slides]
        data |= {of.listed[0]: names, of.listed[1]: [[names, 1]]}
    if of.unrotated_keys[0]:
        data[of.unrotated_keys[0]] = [int(layer.rotation is not None) for layer in layers]
    return data


def _rotations_to_hf(config: ModelConfig, family: Family, layers: Sequence[Attention]) -> dict[str, Any]:
    first = rotation_of(vars(config))
    data: dict[str, Any] = {family.sizes["max_len"].key: first.trained(config.max_len)}
    if not family.rope.by_type:
        return data | rope_to_hf(first, config.head_dim, config.max_len, family.rope)
    types = ["sliding_attention" if layer.window else "full_attention" for layer in layers]
    found = {kind: layer.rotation for kind, layer in zip(types, layers, strict=True) if layer.rotation is not None}
    return data | ropes_to_hf(found, config.head_dim, config.max_len, family.rope)
