"""The mixtures of experts of a `config.json`: which layers have one, how many experts there are and how a token's are chosen.

Families differ in the names of the same few numbers, so a family is one `Mixture` of names and of what it fixes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from partinf.model.config import MOST_LAYERS
from partinf.model.hf_file import HfFile, as_written
from partinf.model.kinds import Activation, Experts, FeedForward, Router

Key = tuple[str, Any]
"""A key of the file and what a missing one means; an empty key is none, and stands for that value."""
_DENSE, _SPARSE = "dense", "sparse"
_USUAL = Router()


@dataclass(frozen=True)
class Mixture:
    """How a family says what its experts are.

    Attributes:
        count: names of the key of the number of experts, of which the first that is there counts, and its default; None for none.
        per_token: key of the number of experts that a token goes through. width: of the d_ff of each.
        each: fields of `FeedForward` that the family fixes; the activation is the model's where it is not among them.
        clamp: key of what the inputs of an expert's activation are cut off at.
        router: what the family fixes. renormalised, scale, groups, chosen_groups: keys of what it does not.
        shared: key of the width of the feed-forward that all tokens go through; `shared_experts`: it counts experts of `width` instead.
        shared_gate: as in `Experts`.
        first: key of the number of leading layers without experts. last: of the number of the last layer with experts, -1 for the last of
            all. every: of n, every n-th layer having experts. listed: of a list of layers without. typed: of a list of the types of all
            layers, which counts where it is given.
    """

    count: tuple[tuple[str, ...], int | None]
    per_token: Key
    width: Key
    each: Mapping[str, Any] = field(default_factory=dict)
    clamp: Key = ("", 0.0)
    router: Router = _USUAL
    renormalised: Key = ("", None)
    scale: Key = ("", 1.0)
    groups: Key = ("", 1)
    chosen_groups: Key = ("", 1)
    shared: Key = ("", 0)
    shared_experts: bool = False
    shared_gate: bool = False
    first: Key = ("", 0)
    last: Key = ("", -1)
    every: Key = ("", 1)
    listed: str = ""
    typed: str = ""

    @property
    def keys(self) -> frozenset[str]:
        named = (self.per_token, self.width, self.clamp, self.renormalised, self.scale, self.groups, self.chosen_groups, self.shared)
        places = (self.first, self.last, self.every)
        return frozenset({*self.count[0], *(key for key, _ in named + places), self.listed, self.typed}) - {""}

    @property
    def some_dense(self) -> bool:
        """Whether layers can be without experts."""
        return bool(self.listed or self.typed or self.first[0] or self.every[0])

    def has(self, experts: Experts) -> bool:
        """Whether experts are of the family as far as it fixes them."""
        router = {one.name: getattr(experts.router, one.name) for one in fields(Router)}
        keyed = {"renormalised": self.renormalised, "scale": self.scale, "groups": self.groups, "chosen_groups": self.chosen_groups}
        fixed = all(value == getattr(self.router, name) for name, value in router.items() if not keyed.get(name, ("", None))[0])
        each = all(getattr(experts.each, name) == value for name, value in self.each.items())
        return fixed and each and experts.shared_gate == (self.shared_gate and experts.shared > 0)


def experts_of(file: HfFile, of: Mixture, activation: Activation, num_layers: int) -> tuple[Experts | None, list[bool]]:
    """The experts of a file, and of each layer whether it has them."""
    mixed = _mixed(file, of, min(max(num_layers, 0), MOST_LAYERS))
    names, count = of.count
    named = next((name for name in names if file.data.get(name) is not None), names[0])
    width = _whole(file, of.width)
    fixed: dict[str, Any] = {"gated": True, "activation": activation, "biases": (), "clamp": _number(file, of.clamp)} | dict(of.each)
    shared = _whole(file, of.shared)
    router: dict[str, Any] = {
        "scale": _number(file, of.scale),
        "groups": _whole(file, of.groups),
        "chosen_groups": _whole(file, of.chosen_groups),
    }
    router["renormalised"] = file.flag(*of.renormalised) if of.renormalised[0] else of.router.renormalised
    found = Experts(
        count=file.whole(named, count) or 0,
        per_token=_whole(file, of.per_token),
        each=FeedForward(width, **fixed),
        router=Router(of.router.score, bias=of.router.bias, correction=of.router.correction, **router),
        shared=shared * width if of.shared_experts else shared,
        shared_gate=of.shared_gate and shared > 0,
    )
    return (found if any(mixed) else None), mixed


def experts_to_hf(of: Mixture, experts: Experts, mixed: Sequence[bool]) -> dict[str, Any]:
    """The keys from which `experts_of` reads them again."""
    width = experts.each.width
    shared, rest = divmod(experts.shared, width) if of.shared_experts else (experts.shared, 0)
    data: dict[str, Any] = dict.fromkeys(of.count[0], experts.count)
    for (key, _), value in (
        (of.per_token, experts.per_token),
        (of.width, width),
        (of.clamp, experts.each.clamp),
        (of.renormalised, experts.router.renormalised),
        (of.scale, experts.router.scale),
        (of.groups, experts.router.groups),
        (of.chosen_groups, experts.router.chosen_groups),
        (of.shared, shared + bool(rest)),
        (of.first, mixed.index(True)),
        (of.last, -1),
        (of.every, 1),
    ):
        data |= {key: value} if key else {}
    data |= {of.listed: [layer for layer, one in enumerate(mixed) if not one]} if of.listed else {}
    return data | ({of.typed: [_SPARSE if one else _DENSE for one in mixed]} if of.typed else {})


def _mixed(file: HfFile, of: Mixture, count: int) -> list[bool]:
    """Of each layer, whether it has experts."""
    if of.typed and file.data.get(of.typed) is not None:
        types = file.data[of.typed]
        if isinstance(types, list) and len(types) == count and all(one in (_DENSE, _SPARSE) for one in types):
            return [one == _SPARSE for one in types]
        file.offend(f"{of.typed} = {as_written(types)}; {_DENSE} or {_SPARSE} for each of {count} layers is needed")
        return [True] * count
    first, last, every = (_whole(file, key) for key in (of.first, of.last, of.every))
    if every < 1:
        file.offend(f"{of.every[0]} = {every}; a whole number of at least 1 is needed")
        return [True] * count
    listed = (file.data.get(of.listed) if of.listed else None) or []
    if not isinstance(listed, list) or any(not isinstance(one, int) or isinstance(one, bool) for one in listed):
        file.offend(f"{of.listed} = {as_written(listed)}; a list of numbers of layers is needed")
        listed = []
    last = count - 1 if last < 0 else last
    without = {*listed}
    return [first <= layer <= last and (layer + 1) % every == 0 and layer not in without for layer in range(count)]


def _whole(file: HfFile, key: Key) -> int:
    """A whole number; the default where the key is missing or null, and there is one."""
    name, absent = key
    if not name or (absent is not None and file.data.get(name) is None):
        return int(absent)
    return file.whole(name, absent) or 0


def _number(file: HfFile, key: Key) -> float:
    name, absent = key
    return file.number(name, absent) if name and file.data.get(name) is not None else float(absent)
