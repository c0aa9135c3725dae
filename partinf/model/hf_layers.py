"""The kinds of layers of a `config.json`: which of them have a window, and how each rotates its queries and keys.

transformers says it in several ways: one window for all layers, a first layer, every n-th layer, or a list of the types of all layers,
which counts where it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from partinf.model.config import MOST_LAYERS
from partinf.model.family import Family, Window
from partinf.model.hf_file import HfFile, as_written
from partinf.model.hf_rope import RopeReader
from partinf.model.kinds import Kind, pattern_of
from partinf.model.rotation import PLAIN, Rotation

_FULL, _SLIDING = "full_attention", "sliding_attention"


def layers_of(file: HfFile, family: Family, sizes: dict[str, int | None], head_dim: int, mixed: Sequence[bool]) -> dict[str, Any]:
    """The fields of `ModelConfig` that say what kinds of layers there are: `window` and `rotation`, or `kinds`, `prefix` and `pattern`.

    Args:
        mixed: of each layer, whether it has the model's experts, where the model has such.
    """
    count = sizes.get("num_layers") or 0
    listed = _listed(file, family.window is not None, count)
    window, types = _windows(file, family.window, listed, count)
    rotations = _rotations(file, family, types, head_dim, sizes.get("max_len") or 0)
    if not types:
        return {}
    turned = [rotations[kind] if turns else None for kind, turns in zip(types, _turning(file, family.window, types), strict=True)]
    if not family.rotates:
        turned = [PLAIN] * len(types)
    layers = [_Layer(*one) for one in zip(types, turned, mixed, strict=True)]
    found = {layer: Kind("", window if layer.type == _SLIDING else 0, layer.rotation, layer.mixed) for layer in layers}
    if len(found) == 1 and (only := next(iter(found.values()))).rotation is not None:
        return {"window": only.window, "rotation": only.rotation}
    names = {layer: _name(layer, [*found]) for layer in found}
    prefix, pattern = pattern_of([names[layer] for layer in layers])
    kinds = tuple(replace(kind, name=names[layer]) for layer, kind in found.items())
    return {"kinds": kinds, "prefix": prefix, "pattern": pattern} if kinds else {}


class _Layer(NamedTuple):
    type: str
    rotation: Rotation | None
    mixed: bool


def _name(layer: _Layer, others: list[_Layer]) -> str:
    """A kind by what tells it from the others: its window, its rotation, its experts."""
    plain = "sliding" if layer.type == _SLIDING else "full"
    if layer.rotation is None and len({one.rotation for one in others if one.type == layer.type}) > 1:
        plain += "_unrotated"
    if len({one.mixed for one in others}) == 1:
        return plain
    inner = "mixed" if layer.mixed else "dense"
    return inner if len({one[:2] for one in others}) == 1 else f"{plain}_{inner}"


def _listed(file: HfFile, windows: bool, count: int) -> list[str] | None:
    types = file.data.get("layer_types")
    if types is None:
        return None
    known = (_FULL, _SLIDING) if windows else (_FULL,)
    if not isinstance(types, list) or any(kind not in known for kind in types):
        strange = next((kind for kind in types if kind not in known), types) if isinstance(types, list) else types
        file.offend(f"layer_types: {as_written(strange)} is not supported; supported: {', '.join(known)}")
        return None
    if count and len(types) != count:
        file.offend(f"layer_types has {len(types)} entries; the model has {count} layers")
        return None
    return types


def _windows(file: HfFile, of: Window | None, listed: list[str] | None, count: int) -> tuple[int, list[str]]:
    """The window of the layers that have one, and the type of every layer."""
    count = min(max(count, 0), MOST_LAYERS)
    if of is None:
        return 0, [_FULL] * count
    window = None if of.flag and not file.flag(of.flag, False) else file.data.get(of.key, of.absent)
    if window is None:
        if listed and _SLIDING in listed and of.typed:
            file.offend(f"layer_types asks for {_SLIDING}, but there is no {of.key}")
        return 0, [_FULL] * count
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        file.offend(f"{of.key} = {as_written(window)}; a whole number of at least 1, or null, is needed")
        return 0, [_FULL] * count
    if listed is not None and of.typed:
        return window, listed
    slides = _slides(file, of, count)
    types = [_SLIDING if one else _FULL for one in slides]
    if listed is not None and types != listed:
        file.offend("layer_types is not what this family's windows are; delete it if all layers have the window")
    return (window if any(slides) else 0), types


def _slides(file: HfFile, of: Window, count: int) -> list[bool]:
    """Of each layer, whether it has a window, in a file that does not list them."""
    if of.listed[0]:
        return _local(file, of, count)
    if of.unrotated_keys[0]:
        return [not turns for turns in _unlisted(file, of, count)]
    key, default = of.every
    if default:
        every = file.whole(key, default) if key else default
        if every is None or every < 1:
            file.offend(f"{key} = {as_written(file.data.get(key))}; a whole number of at least 1 is needed")
            return [True] * count
        full = 0 if of.full_first else every - 1
        return [layer % every != full for layer in range(count)]
    key, first = of.first
    start = file.whole(key, first) if key else 0
    return [layer >= (start or 0) for layer in range(count)]


def _local(file: HfFile, of: Window, count: int) -> list[bool]:
    """Of each layer, whether GPT-Neo calls it local: by a list of all, or by pairs of a list and how often it repeats."""
    key, counted = of.listed
    names = file.data.get(key)
    if names is None:
        pairs = file.data.get(counted, [[["global", "local"], count // 2]])
        right = isinstance(pairs, list) and all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], list) and isinstance(pair[1], int) and 0 <= pair[1] <= count
            for pair in pairs
        )
        names = [name for part, times in pairs for name in part * times] if right else pairs
    if not isinstance(names, list) or len(names) != count or any(name not in ("global", "local") for name in names):
        file.offend(f"{key} = {as_written(names)}; global or local for each of {count} layers is needed")
        return [False] * count
    return [name == "local" for name in names]


def _turning(file: HfFile, of: Window | None, types: list[str]) -> list[bool]:
    """Of each layer, whether it rotates its queries and keys."""
    if of is not None and of.unrotated_keys[0]:
        return _unlisted(file, of, len(types))
    if of is not None and of.unrotated and file.data.get(of.key, of.absent) is not None:
        return [kind == _SLIDING for kind in types]
    return [True] * len(types)


def _unlisted(file: HfFile, of: Window, count: int) -> list[bool]:
    """Of each layer, whether it rotates, in a family that lists them or leaves out every n-th."""
    list_key, every_key, default = of.unrotated_keys
    listed = file.data.get(list_key)
    if listed is None:
        every = max(file.whole(every_key, default) or 1, 1)
        return [(layer + 1) % every != 0 for layer in range(count)]
    if not isinstance(listed, list) or len(listed) != count or any(one not in (0, 1) for one in listed):
        file.offend(f"{list_key} = {as_written(listed)}; a list of 0 or 1 for each of {count} layers is needed")
        return [True] * count
    return [bool(one) for one in listed]


def _rotations(file: HfFile, family: Family, types: list[str], head_dim: int, max_len: int) -> dict[str, Rotation]:
    if not family.rotates:
        return dict.fromkeys(types, PLAIN)
    reader = RopeReader(file, family.rope, head_dim, max_len)
    if not family.rope.by_type:
        return dict.fromkeys(types, reader.rotation())
    found = reader.by_type()
    return {kind: found.get(kind, PLAIN) for kind in types}
