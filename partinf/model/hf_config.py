"""Hugging Face `config.json`: read for every family of `families`, written for those that say so.

A file is read as if it wanted to be misread: a key that is neither read nor known to change no result is refused, and so is any value
that this library does not compute. What would be silently ignored would run as another model than the one that was published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from partinf.foundation.documents import shown
from partinf.foundation.errors import InvalidInput, raise_offences
from partinf.model.config import ModelConfig, Position
from partinf.model.families import FAMILIES, HARMLESS, ONLY
from partinf.model.family import Family
from partinf.model.hf_file import HfFile, as_written, same
from partinf.model.hf_rope import RopeReader, rope_to_hf

_WEIGHTS = ("quantization_config", "compression_config", "quantization")  # where quantised checkpoints describe how they are stored
_NAMES = ("architectures", "model_type", "auto_map", "tie_word_embeddings", *_WEIGHTS)


def config_from_hf(data: Mapping[str, Any], name: str) -> ModelConfig:
    """Read a Hugging Face `config.json` of a supported family, as transformers 4 or 5 writes it.

    Version 5 writes `rope_parameters` and `dtype` where version 4 wrote `rope_theta`, `rope_scaling` and `torch_dtype`.

    Raises:
        InvalidInput: another architecture, missing keys, values of another type, options that are not supported, keys that are not
            known; all at once.
    """
    file = _File(data, f"{name}: config.json")
    family = file.family()
    sizes = file.sizes(family)
    file.choices(family)
    eps_key, eps = family.norm_eps
    fields: dict[str, Any] = {
        "norm_eps": file.number(eps_key, eps) if eps_key else eps,
        "tied_embeddings": file.flag("tie_word_embeddings", family.tied),
    }
    fields["window"] = file.window(family, sizes.get("num_layers"))
    if family.features["position"] is Position.ROPE:
        fields["rotation"] = RopeReader(file, family.rope, _head_dim(sizes), sizes.get("max_len") or 0).rotation()
    file.refuse_unknown(family)
    raise_offences(file.offences)
    fields |= {**family.block, **_derived(sizes, name)}
    if "rotation" in fields:
        fields["max_len"] = fields["rotation"].longest(fields["max_len"])
    return ModelConfig(name=name, source="config.json", family=family.model_type, **fields)


class _File(HfFile):
    """A `config.json`, read as one family means it."""

    def family(self) -> Family:
        """The family that both names mean; either is enough.

        Raises:
            InvalidInput: no family, another one's name beside it, or code of its own.
        """
        architectures, model_type = self.data.get("architectures") or [], self.data.get("model_type") or ""
        if not isinstance(architectures, list) or not all(isinstance(one, str) for one in architectures):
            raise InvalidInput(f"{self.where}: architectures = {as_written(architectures)}; a list of names is needed")
        if not isinstance(model_type, str):
            raise InvalidInput(f"{self.where}: model_type = {as_written(model_type)}; a name is needed")
        self._refuse_code()
        by_architecture = {family.architecture: family for family in FAMILIES.values()}
        named = [by_architecture.get(one) for one in architectures] + ([FAMILIES.get(model_type)] if model_type else [])
        found = named[0] if named else None
        if found is None or None in named:
            described = next((one for one in (*architectures, model_type) if one not in (*by_architecture, *FAMILIES)), None)
            what = "names no architecture" if described is None else f"describes {shown(described)}"
            raise InvalidInput(f"{self.where} {what}; supported architectures: {', '.join(by_architecture)}")
        if any(family is not found for family in named):
            both = f"architectures = {as_written(architectures)} and model_type = {as_written(model_type)}"
            raise InvalidInput(f"{self.where}: {both} name different families; correct the one that is wrong")
        return found

    def _refuse_code(self) -> None:
        code = self.data.get("auto_map")
        if code is None or (isinstance(code, dict) and not any(key.startswith(("AutoModel", "AutoConfig")) for key in code)):
            return
        raise InvalidInput(f"{self.where}: auto_map = {as_written(code)}; models that bring their own code are not supported")

    def sizes(self, family: Family) -> dict[str, int | None]:
        """Every size that the file has, or None where it follows from the others."""
        found: dict[str, int | None] = {}
        for field, size in family.sizes.items():
            if size.key not in self.data and size.absent is not None:
                found[field] = size.absent
            elif self.data.get(size.key) is None and size.follows:
                found[field] = None
            else:
                found[field] = self.whole(size.key)
        return found

    def choices(self, family: Family) -> None:
        """Keys of which only some values are computed."""
        for key, supported in {**family.only, **ONLY}.items():
            value = self.data.get(key, supported[0])
            if not any(same(value, one) for one in supported) and not (value is None and False in supported):
                values = ", ".join(map(as_written, supported))
                self.offences.append(f"{self.where}: {key} = {as_written(value)} is not supported; supported: {values}")
        for key, other in family.equal:
            value, wanted = self.data.get(key), self.data.get(other)
            if value is not None and not same(value, wanted):
                self.offences.append(
                    f"{self.where}: {key} = {as_written(value)} is not supported; it must equal {other} = {as_written(wanted)}"
                )
        for key in _WEIGHTS:
            if self.data.get(key) is not None:
                method = self.data[key].get("quant_method") if isinstance(self.data[key], dict) else None
                self.offences.append(
                    f"{self.where}: {key} = {as_written(method or self.data[key])}; quantised checkpoints are not read: "
                    "take the model's unquantised weights, and quantise with --weights int8"
                )

    def window(self, family: Family, layers: int | None) -> int:
        """The sliding window that some layer has; 0 where none has."""
        types = self._layer_types(family, layers)
        if family.window is None or layers is None:
            return 0
        absent, flag, (first, first_layer) = family.window.absent, family.window.flag, family.window.first
        window = None if flag and not self.flag(flag, False) else self.data.get("sliding_window", absent)
        if types is not None and flag:
            slides = "sliding_attention" in types
            if slides and window is None:
                self.offences.append(f"{self.where}: layer_types asks for sliding_attention, but there is no sliding_window")
        elif first and window is not None:
            start = self.whole(first) if first in self.data else first_layer
            slides = start is not None and start < layers
        else:
            slides = True
        if window is None or not slides:
            return 0
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            self.offences.append(f"{self.where}: sliding_window = {as_written(window)}; a whole number of at least 1, or null, is needed")
            return 0
        return window

    def _layer_types(self, family: Family, layers: int | None) -> list[str] | None:
        types = self.data.get("layer_types")
        if types is None:
            return None
        known = ("full_attention", "sliding_attention") if family.window else ("full_attention",)
        if not isinstance(types, list) or any(kind not in known for kind in types):
            strange = next((kind for kind in types if kind not in known), types) if isinstance(types, list) else types
            self.offences.append(f"{self.where}: layer_types: {as_written(strange)} is not supported; supported: {', '.join(known)}")
            return None
        if layers is not None and len(types) != layers:
            self.offences.append(f"{self.where}: layer_types has {len(types)} entries; the model has {layers} layers")
        return types

    def refuse_unknown(self, family: Family) -> None:
        """An offence for every key that is neither read nor known to change nothing. Null asks for nothing."""
        known = HARMLESS | family.harmless | {size.key for size in family.sizes.values()} | {*family.only, *ONLY, *_NAMES, "layer_types"}
        known |= {family.norm_eps[0], *(key for key, _ in family.equal), *(family.window.keys if family.window else ())}
        known |= family.rope.keys if family.features["position"] is Position.ROPE else frozenset()
        self.unknown(known - {""})


def _head_dim(sizes: Mapping[str, int | None]) -> int:
    """Dimensions of a head, 0 where the file is wrong about them."""
    embed, heads = sizes.get("embed_dim") or 0, sizes.get("num_heads") or 0
    return sizes.get("head_dim") or (embed // heads if heads > 0 else 0)


def _derived(sizes: Mapping[str, int | None], name: str) -> dict[str, int]:
    """All sizes; those that are absent or None follow from the others."""
    found = {size: value for size, value in sizes.items() if value is not None}
    embed, heads = found["embed_dim"], max(found["num_heads"], 1)  # ModelConfig refuses what is below 1
    if "head_dim" not in found and embed % heads:
        raise InvalidInput(f"{name}: config.json: a width of {embed} does not divide into {heads} heads")
    return {"ffn_dim": 4 * embed, "num_kv_heads": heads, "head_dim": embed // heads} | found


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that both transformers 4 and 5 read; the inverse of `config_from_hf` for the families that are written.

    Raises:
        InvalidInput: blocks that none of them has.
    """
    family = _written(config)
    data: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    data |= {size.key: getattr(config, field) for field, size in family.sizes.items()}
    data |= {key: values[0] for key, values in family.only.items()}
    data |= {family.norm_eps[0]: config.norm_eps, "tie_word_embeddings": config.tied_embeddings}
    if family.window is not None:
        data["sliding_window"] = config.window or None
        data |= {family.window.flag: bool(config.window)} if family.window.flag else {}
        data |= {family.window.first[0]: 0 if config.window else config.num_layers} if family.window.first[0] else {}
    if config.position is Position.ROPE:
        data["max_position_embeddings"] = config.rotation.trained(config.max_len)
        data |= rope_to_hf(config.rotation, config.head_dim, config.max_len)
    return data


def _written(config: ModelConfig) -> Family:
    """The family as which a model is written: its own, or the first that has such blocks.

    Raises:
        InvalidInput: none is written that has.
    """
    written = [family for family in FAMILIES.values() if family.written]
    for family in sorted(written, key=lambda family: family.model_type != config.family):  # its own comes first
        if not family.differences(config) and (family.window or not config.window):
            return family
    titles = ", ".join(family.title for family in written)
    raise_offences(
        f"model {config.name}: {key} = {json.dumps(getattr(config, key))}; Hugging Face directories are written for {titles} only, "
        f"whose {key} is {json.dumps(value)}; save with orbax"
        for key, value in written[0].differences(config).items()
    )
    raise InvalidInput(f"model {config.name}: Hugging Face directories are written for {titles} only; save with orbax")
