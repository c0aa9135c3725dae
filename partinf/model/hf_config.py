"""Hugging Face `config.json`, read for every family of `families`; `hf_write` writes it.

A file is read as if it wanted to be misread: a key that is neither read nor known to change no result is refused, and so is any value
that this library does not compute. What would be silently ignored would run as another model than the one that was published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from partinf.foundation.documents import shown
from partinf.foundation.errors import InvalidInput, raise_offences
from partinf.model.config import MATRICES, MOST_LAYERS, ModelConfig
from partinf.model.families import FAMILIES, HARMLESS, ONLY, REFUSED, WRAPPERS
from partinf.model.family import Family, Wrapper
from partinf.model.hf_experts import experts_of
from partinf.model.hf_file import HfFile, as_written, same
from partinf.model.hf_layers import layers_of
from partinf.model.kinds import Kind
from partinf.model.rotation import PLAIN, Rotation

_WEIGHTS = ("quantization_config", "compression_config", "quantization")  # where quantised checkpoints describe how they are stored
_LARGE = 1e18  # of numbers that are turned into others
_NAMES = ("architectures", "model_type", "auto_map", "tie_word_embeddings", *_WEIGHTS)


def config_from_hf(data: Mapping[str, Any], name: str) -> ModelConfig:
    """Read a Hugging Face `config.json` of a supported family, as transformers 4 or 5 writes it.

    Version 5 writes `rope_parameters` and `dtype` where version 4 wrote `rope_theta`, `rope_scaling` and `torch_dtype`.

    Raises:
        InvalidInput: another architecture, missing keys, values of another type, options that are not supported, keys that are not
            known; all at once.
    """
    file = _File(data, f"{name}: config.json")
    wrapper = file.wrapper()
    file = file if wrapper is None else file.text(wrapper)
    family, remark = file.family()
    sizes = file.sizes(family)
    file.choices(family)
    eps_key, eps = family.norm_eps
    fields: dict[str, Any] = {
        "norm_eps": file.number(eps_key, eps) if eps_key else eps,
        "tied_embeddings": file.flag("tie_word_embeddings", family.tied),
    }
    fields |= file.features(family)
    mixed = [True] * min(max(sizes.get("num_layers") or 0, 0), MOST_LAYERS)
    if family.mixture is not None:
        activation = fields.get("activation", ModelConfig.activation)
        fields["experts"], mixed = experts_of(file, family.mixture, activation, len(mixed))
    mixed = mixed if any(mixed) else [True] * len(mixed)
    fields |= layers_of(file, family, sizes, _head_dim(sizes), mixed)
    file.refuse_unknown(family)
    raise_offences(file.offences)
    fields |= _derived(sizes, name)
    fields |= {"ffn_dim": 0} if fields.get("experts") is not None and all(mixed) else {}
    fields |= family.derived(fields)
    fields = {field: value for field, value in fields.items() if not field.startswith("_")}
    if family.rotates:
        fields["max_len"] = rotation_of(fields).longest(fields["max_len"])
    return ModelConfig(name=name, source=_source(remark, wrapper), family=family.model_type, **fields)


def _source(remark: str, wrapper: Wrapper | None) -> str:
    """Where the sizes come from, and what a reader should know of it."""
    return "; ".join(["config.json", *([remark] if remark else []), *([f"{wrapper.unread} are not read"] if wrapper else [])])


class _File(HfFile):
    """A `config.json`, read as one family means it."""

    def wrapper(self) -> Wrapper | None:
        """The family of models that read more than text as which the file describes itself; None for one of text."""
        architectures = self.data.get("architectures")
        named = self.data.get("model_type") or (architectures[0] if isinstance(architectures, list) and architectures else None)
        return next((one for one in WRAPPERS.values() if named in (one.model_type, one.architecture)), None)

    def text(self, wrapper: Wrapper) -> _File:
        """The part of such a file that describes the model of text."""
        self._refuse_code()
        part = self.data.get(wrapper.text)
        if not isinstance(part, dict):
            raise InvalidInput(f"{self.where}: {wrapper.text} = {as_written(part)}; an object is needed")
        self.quantised()
        self.unknown(HARMLESS | wrapper.harmless | {*_NAMES, wrapper.text})
        own = {key: self.data[key] for key in ("tie_word_embeddings",) if key in self.data}
        part = {"model_type": wrapper.inner} | {key: value for key, value in part.items() if key != "architectures"} | own
        return _File(part, self.where, f"{wrapper.text}: ", self.offences)

    def family(self) -> tuple[Family, str]:
        """The family that `model_type` means, or `architectures` where there is none; and what to say of names that disagree.

        Raises:
            InvalidInput: no family that is read, or code of its own.
        """
        architectures, model_type = self.data.get("architectures") or [], self.data.get("model_type") or ""
        if not isinstance(architectures, list) or not all(isinstance(one, str) for one in architectures):
            raise InvalidInput(f"{self.where}: architectures = {as_written(architectures)}; a list of names is needed")
        if not isinstance(model_type, str):
            raise InvalidInput(f"{self.where}: model_type = {as_written(model_type)}; a name is needed")
        self._refuse_code()
        by_architecture = {family.architecture: family for family in FAMILIES.values()}
        by_architecture |= {_without_head(one): family for one, family in by_architecture.items()}
        strange = next((one for one in architectures if one not in by_architecture), None)
        found = FAMILIES.get(model_type) if model_type else next(map(by_architecture.get, architectures), None)
        if found is None or strange is not None:
            described = model_type if model_type and found is None else strange
            what = "names no architecture" if described is None else f"describes {shown(described)}"
            raise InvalidInput(f"{self.where} {what}; {_why(described)}")
        others = [one for one in architectures if by_architecture[one] is not found]
        return found, f"model_type is {model_type!r}, which decides; architectures names {', '.join(others)}" if others else ""

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
                self.offend(f"{key} = {as_written(value)} is not supported; supported: {values}")
        for key, other in family.equal:
            value, wanted = self.data.get(key), self.data.get(other)
            if value is not None and not same(value, wanted):
                self.offend(f"{key} = {as_written(value)} is not supported; it must equal {other} = {as_written(wanted)}")
        self.quantised(family.quantised)

    def quantised(self, read: Sequence[str] = ()) -> None:
        """An offence where weights are stored in fewer bits, in a format that is not read."""
        for key in _WEIGHTS:
            if self.data.get(key) is not None:
                method = self.data[key].get("quant_method") if isinstance(self.data[key], dict) else None
                if method in read:
                    continue
                self.offend(
                    f"{key} = {as_written(method or self.data[key])}; quantised checkpoints are not read: "
                    "take the model's unquantised weights, and quantise with --weights int8"
                )

    def features(self, family: Family) -> dict[str, Any]:
        """What the blocks are: what the family fixes, and what its keys decide."""
        fields = dict(family.block)
        for pick in family.picks:
            value = self.data.get(pick.key, pick.absent)
            known = [one for one, _ in pick.values]
            value = pick.absent if value is None and None not in known else value
            chosen = next((fields for one, fields in pick.values if same(value, one)), None)
            if chosen is None:
                self.offend(f"{pick.key} = {as_written(value)} is not supported; supported: {', '.join(map(as_written, known))}")
            fields |= chosen or {}
        for scalar in family.scalars:
            if self.data.get(scalar.key, scalar.absent) is not None:
                value = self.number(scalar.key, scalar.absent or 1.0)
                fields[scalar.field] = scalar.of(value) if 0 < abs(value) < _LARGE else value
        given = {*family.block.get("biases", ())}
        for bias in family.biases:
            if self.data.get(bias.key, bias.absent) is not None and self.flag(bias.key, bias.absent):
                given |= {*bias.matrices}
        return fields | {"biases": tuple(matrix for matrix in MATRICES if matrix in given)}

    def refuse_unknown(self, family: Family) -> None:
        """An offence for every key that is neither read nor known to change nothing. Null asks for nothing."""
        known = HARMLESS | family.harmless | family.keys | {*ONLY, *_NAMES, "layer_types"}
        known |= family.rope.keys if family.rotates else frozenset()
        self.unknown(known)


def _without_head(architecture: str) -> str:
    """The name of the same model without its output matrix, as models of embeddings are published."""
    return architecture.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")


def _why(described: str | None) -> str:
    if described is not None and described in REFUSED:
        return f"{REFUSED[described]}, which is not supported"
    return f"supported model types: {', '.join(sorted((*FAMILIES, *WRAPPERS)))}"


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


def rotation_of(fields: Mapping[str, Any]) -> Rotation:
    """The rotation of a model, or of the first kind of its layers that rotates."""
    kinds = fields.get("kinds") or (Kind("", 0, fields.get("rotation", PLAIN)),)
    return next((kind.rotation for kind in kinds if kind.rotation is not None), PLAIN)
