"""Layouts: a role for every mesh axis, and per phase which axes gather weights and how attention is split.

This is the whole vocabulary of partitioning in partinf. Names such as "2D weight-stationary" are derived from roles for the reader
(`ffn_name`, `attention_name`) and never branched on. Storage roles hold for the life of a model; phases choose, per step, which of the
stored shards are gathered and how the attention core is split, so prefill and decode may differ without moving a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from enum import StrEnum
from functools import cached_property, lru_cache

from partinf.axes import is_axis_name
from partinf.foundation.errors import raise_offences


class Role(StrEnum):
    """What a mesh axis splits in the stored weights.

    EMBED splits d_model (the contraction of W_in), FFN splits d_ff and the query heads, REPLICA copies the weights and splits the
    tokens, STAGE splits the layers: every stage runs its own of them for a batch of its own.
    """

    EMBED = "embed"
    FFN = "ffn"
    REPLICA = "replica"
    STAGE = "stage"

    __hash__ = str.__hash__  # a search asks for it some hundred thousand times


class ExpertRole(StrEnum):
    """What a mesh axis splits in the stored matrices of experts, `X F E`, which may differ from what it splits in the dense ones.

    EXPERT splits the experts, FFN and EMBED the d_ff and d_model of each, REPLICA copies them all, STAGE splits the layers.
    """

    EXPERT = "expert"
    FFN = "ffn"
    EMBED = "embed"
    REPLICA = "replica"
    STAGE = "stage"

    __hash__ = str.__hash__


class Dispatch(StrEnum):
    """How tokens that are split over an axis reach the experts that it splits.

    GATHER: all rows are gathered along it, every device adds up what its own experts make of them, and the sums are reduce-scattered.
    EXCHANGE: every device sends each row to those that hold an expert of it and nowhere else, and they send the outputs back.
    """

    GATHER = "gather"
    EXCHANGE = "exchange"

    __hash__ = str.__hash__


class AttentionRole(StrEnum):
    """What a mesh axis splits in the attention core.

    HEADS splits query heads (and key-value heads as far as they divide), BATCH whole requests, SEQUENCE the context of the KV cache,
    NONE nothing.
    """

    HEADS = "heads"
    BATCH = "batch"
    SEQUENCE = "sequence"
    NONE = "none"

    __hash__ = str.__hash__


PHASES = ("prefill", "decode")


class Ring(StrEnum):
    """How a looped collective goes around its axis; `partinf.partition.collective_matmul` says what each is for."""

    ONE_WAY = "one-way"
    HALVES = "halves"
    BOTH = "both-ways"


@dataclass(frozen=True)
class Loop:
    """An axis whose gathers of d_model before a sublayer, and reduce-scatters after it, are looped with the adjacent products.

    Attributes:
        gathers: False leaves the gathers alone: their parts add up in float32, which costs more memory traffic the more tokens there are,
            where the parts of a scatter are written once.
    """

    axis: str
    ring: Ring = Ring.BOTH
    gathers: bool = True


@dataclass(frozen=True)
class Phase:
    """How one kind of step uses the stored shards.

    Attributes:
        gather: axes whose weight shards are gathered before use; the tokens are split over them instead.
        attention: (axis, role) for every mesh axis, in mesh order.
        loop: where collectives run behind matmuls; None leaves every collective to itself.
        ahead: whether weights are gathered before the products that precede theirs, so that the gathers overlap products: those
            that a layer needs last at its beginning, those that the next layer needs first while this one ends. It takes the place of one
            more layer's gathered weights.
        whole: whether what passes between sublayers is split over the axes that split d_model in the weights alone, so that a sublayer ends
            with an all-reduce and the next begins, norm and all, with nothing. Otherwise it is split over d_ff's axes too: a sublayer ends
            with a reduce-scatter, a norm sums over devices, and the next begins with an all-gather.
        gather_experts: axes whose shards of experts' matrices are gathered before use, so that no token is sent along them. dispatch: how
            tokens are sent along the others that split tokens and experts' matrices. Both say nothing for a model without experts.
    """

    gather: tuple[str, ...]
    attention: tuple[tuple[str, AttentionRole], ...]
    loop: Loop | None = None
    ahead: bool = False
    whole: bool = False
    gather_experts: tuple[str, ...] = ()
    dispatch: Dispatch = Dispatch.GATHER

    def attention_axes(self, role: AttentionRole) -> tuple[str, ...]:
        """The axes with this attention role, in mesh order."""
        return self._by_role.get(role, ())

    @cached_property
    def _by_role(self) -> dict[AttentionRole, tuple[str, ...]]:
        return {role: tuple(axis for axis, has in self.attention if has is role) for role in AttentionRole}


@dataclass(frozen=True)
class Layout:
    """Roles of all mesh axes: storage once, and one `Phase` each for prefill and decode.

    Attributes:
        storage: (axis, role) for every mesh axis, in mesh order.
        experts: the same for experts' matrices; empty where every axis splits them as it splits the dense ones.
        check: False for the thousands that a search makes, which are right by construction.

    A worked example: 2×2×2 devices, axes x, y, z; dense weights x: replica, y: embed, z: ffn; experts' x: expert, y: expert, z: ffn.
    X 8 experts, 2 of them for every token, E 64, F 32; a step of 16 tokens, dispatched by gathering. Local shapes of one device:

        1. the residual between sublayers, and its norm (squares of all parts)         h [16.x = 8, E.yz = 16]
        2. x splits tokens and experts: all-gather(x) of rows. y splits no tokens and no E of experts, z neither: all-gather(yz) of E
                                                                                    h [16, E = 64]
        3. h · router [8, 64] in float32, the same on all devices; the 2 best       experts [16, 2], weights [16, 2]
        4. this device holds X.xy = 2 experts. Rows that chose them, sorted by expert: at most 16 · min(2, 2) = 32, the others are padding
                                                                                    rows [32, 64], sizes [2]
        5. rows · W_in [X.xy 2, 2, F.z 16, 64], activation                          [32, F.z = 16]
        6. · W_out [X.xy 2, 64, F.z 16], times the weights, added up by token       [16, E = 64] {xyz unreduced}
        7. reduce-scatter(x) onto rows, (yz) onto E                                 h [16.x = 8, E.yz = 16]

    Along an axis that copies experts' matrices but splits dense ones, the rows of step 2 are split instead of gathered: what splits no
    matrix of experts splits tokens.
    """

    storage: tuple[tuple[str, Role], ...]
    prefill: Phase
    decode: Phase
    check: InitVar[bool] = True
    experts: tuple[tuple[str, ExpertRole], ...] = ()

    def __post_init__(self, check: bool) -> None:
        if check:
            raise_offences(self.offences())

    @cached_property
    def expert_roles(self) -> dict[str, ExpertRole]:
        """What every mesh axis splits in experts' matrices."""
        return dict(self.experts) or {axis: ExpertRole(role.value) for axis, role in self.storage}

    def expert_axes(self, role: ExpertRole) -> tuple[str, ...]:
        """The axes with this role for experts' matrices, in mesh order."""
        return _expert_axes_with(self._expert_items, role)

    def expert_splits(self, phase: Phase, role: ExpertRole) -> tuple[str, ...]:
        """The axes of this role that still split experts' matrices after gathering in this phase, in mesh order."""
        stored = self.expert_axes(role)
        return tuple(axis for axis in stored if axis not in phase.gather_experts) if phase.gather_experts else stored

    def expert_token_axes(self, phase: Phase) -> tuple[str, ...]:
        """The axes that split the rows that experts multiply, before any exchange: all that split neither experts' matrices nor layers."""
        return _expert_token_axes(self.axes, self._expert_items, phase.gather_experts)

    @cached_property
    def _expert_items(self) -> tuple[tuple[str, ExpertRole], ...]:
        return tuple(self.expert_roles.items())

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes' names, in mesh order."""
        return tuple(axis for axis, _ in self.storage)

    def storage_axes(self, role: Role) -> tuple[str, ...]:
        """The axes with this storage role, in mesh order."""
        return _axes_with(self.storage, role)

    @property
    def weight_axes(self) -> tuple[str, ...]:
        """All axes that split weights, those of d_model before those of d_ff: the digit order of every d_model dimension."""
        return self.storage_axes(Role.EMBED) + self.storage_axes(Role.FFN)

    def phase(self, name: str) -> Phase:
        """`prefill` or `decode`."""
        return {"prefill": self.prefill, "decode": self.decode}[name]

    def token_axes(self, phase: Phase) -> tuple[str, ...]:
        """The axes that split tokens in the linear layers of this phase: replicas and gathered ones, in mesh order."""
        split = set(self.storage_axes(Role.REPLICA)) | set(phase.gather)
        return tuple(axis for axis in self.axes if axis in split)

    def offences(self) -> list[str]:
        """Everything that keeps these roles from being a layout."""
        offences = []
        names = list(self.axes)
        offences += [f"axis '{name}' has a storage role twice" for name in sorted({n for n in names if names.count(n) > 1})]
        offences += [f"'{name}' is not an axis name (lower-case letters and digits)" for name in names if not is_axis_name(name)]
        stored = set(self.weight_axes)
        for label in PHASES:
            phase = self.phase(label)
            attended = [axis for axis, _ in phase.attention]
            for axis in sorted({a for a in attended if attended.count(a) > 1}):
                offences.append(f"{label}: axis '{axis}' has an attention role twice")
            for axis in phase.gather:
                if axis not in names:
                    offences.append(f"{label}: gathers over '{axis}', which is no axis of this layout ({', '.join(names)})")
                elif axis not in stored:
                    storing = ", ".join(self.weight_axes) or "none"
                    offences.append(f"{label}: gathers over '{axis}', which stores no shard of the weights; those that do: {storing}")
            strange = [axis for axis in attended if axis not in names]
            offences += [f"{label}: attention role for '{axis}', which is no axis of this layout ({', '.join(names)})" for axis in strange]
            offences += [f"{label}: axis '{axis}' has no attention role" for axis in names if axis not in attended]
            if phase.ahead and not phase.gather:
                offences.append(f"{label}: gathers ahead, but gathers no weights; name the axes in `gather`")
            if phase.whole and phase.loop is not None:
                offences.append(f"{label}: loops over '{phase.loop.axis}', but what passes between sublayers is whole; one of the two")
            looped = [axis for axis in self.storage_axes(Role.FFN) if axis not in phase.gather]
            if phase.loop is not None and phase.loop.axis not in looped:
                can = ", ".join(looped) or "none"
                offences.append(f"{label}: loops over '{phase.loop.axis}', which splits no d_ff in this phase; those that do: {can}")
        return offences + self._expert_offences() + self._stage_offences()

    def _expert_offences(self) -> list[str]:
        names, given = list(self.axes), [axis for axis, _ in self.experts]
        offences = [f"experts: axis '{axis}' has a role twice" for axis in sorted({a for a in given if given.count(a) > 1})]
        offences += [f"experts: role for '{a}', which is no axis of this layout ({', '.join(names)})" for a in given if a not in names]
        offences += [f"experts: axis '{axis}' has no role" for axis in names if given and axis not in given]
        if offences:
            return offences
        roles = self.expert_roles
        for axis, role in self.storage:
            if (role is Role.STAGE) is not (roles[axis] is ExpertRole.STAGE):
                offences.append(f"experts: axis '{axis}' has role {roles[axis]}, and {role} for other weights; stage is both or neither")
        for label in PHASES:
            phase = self.phase(label)
            tokens = self.token_axes(phase)
            can = [a for a in names if a in tokens and roles[a] not in (ExpertRole.REPLICA, ExpertRole.STAGE)]
            offences += [
                f"{label}: gathers experts over '{axis}'; axes that split both tokens and experts' matrices: {', '.join(can) or 'none'}"
                for axis in phase.gather_experts
                if axis not in can
            ]
        return offences

    def _stage_offences(self) -> list[str]:
        stages = self.storage_axes(Role.STAGE)
        return [
            f"{label}: axis '{axis}' attends over {role}, but a stage axis splits whole layers and nothing within one; valid: none"
            for label in (PHASES if stages else ())
            for axis, role in self.phase(label).attention
            if axis in stages and role is not AttentionRole.NONE
        ]


@lru_cache(maxsize=1 << 12)
def _axes_with(storage: tuple[tuple[str, Role], ...], role: Role) -> tuple[str, ...]:
    return tuple(axis for axis, has in storage if has is role)


@lru_cache(maxsize=1 << 12)
def _expert_axes_with(roles: tuple[tuple[str, ExpertRole], ...], role: ExpertRole) -> tuple[str, ...]:
    return tuple(axis for axis, has in roles if has is role)


@lru_cache(maxsize=1 << 12)
def _expert_token_axes(axes: tuple[str, ...], roles: tuple[tuple[str, ExpertRole], ...], gathered: tuple[str, ...]) -> tuple[str, ...]:
    splitting = {axis for axis, role in roles if role is ExpertRole.STAGE or (role is not ExpertRole.REPLICA and axis not in gathered)}
    return tuple(axis for axis in axes if axis not in splitting)


def head_axes(layout: Layout) -> tuple[str, ...]:
    """Every axis that may split the query heads, major first: the stored ones, then those that attention adds in some phase."""
    stored = layout.storage_axes(Role.FFN)
    attended = layout.prefill.attention_axes(AttentionRole.HEADS) + layout.decode.attention_axes(AttentionRole.HEADS)
    return stored + tuple(axis for axis in layout.axes if axis in attended and axis not in stored)


def kv_head_axes(layout: Layout, sizes: Mapping[str, int], num_kv_heads: int) -> tuple[str, ...]:
    """The leading `head_axes` as far as they divide the key-value heads; over the others key-value heads are replicated."""
    taken: list[str] = []
    ways = 1
    for axis in head_axes(layout):
        ways *= sizes[axis]
        if num_kv_heads % ways:
            break
        taken.append(axis)
    return tuple(taken)


def letter_axes(layout: Layout, sizes: Mapping[str, int], num_kv_heads: int) -> dict[str, tuple[str, ...]]:
    """The mesh axes that split each letter of a stored parameter or of the cache, major first; other letters are whole.

    `D` stands for the embedding's d_model, which is split over all weight axes; `C` for the cache's key-value heads and `P` for its
    pages; `N` for stacked layers, and for whatever else every pipeline stage has its own of; `R` for rows that only copies of the weights
    split; `V` is whole in storage, `W` is the vocabulary of logits, split over all weight axes. `X`, `f` and `e` are the experts, and the
    d_ff and d_model of each.
    """
    ffn, decode = layout.storage_axes(Role.FFN), layout.decode
    kv_heads = kv_head_axes(layout, sizes, num_kv_heads)
    cached = set(decode.attention_axes(AttentionRole.HEADS))
    return {
        "E": layout.storage_axes(Role.EMBED),
        "D": layout.weight_axes,
        "W": layout.weight_axes,
        "F": ffn,
        "H": ffn,
        "K": tuple(axis for axis in kv_heads if axis in ffn),
        "C": tuple(axis for axis in kv_heads if axis in cached),
        "P": decode.attention_axes(AttentionRole.BATCH) + decode.attention_axes(AttentionRole.SEQUENCE),
        "N": layout.storage_axes(Role.STAGE),
        "R": layout.storage_axes(Role.REPLICA),
        "X": layout.expert_axes(ExpertRole.EXPERT),
        "f": layout.expert_axes(ExpertRole.FFN),
        "e": layout.expert_axes(ExpertRole.EMBED),
    }


def ffn_name(layout: Layout, phase: Phase, sizes: Mapping[str, int]) -> str:
    """The paper's name for the FFN roles of a phase, for the reader: ws-1d, ws-2d, wg-x, wg-xy, wg-xyz or other.

    Axes of size 1 do not count. X stands for the axes of d_model, as in the paper's storage `E_x F_yz`.
    """
    embed = {axis for axis in layout.storage_axes(Role.EMBED) if sizes[axis] > 1}
    ffn = {axis for axis in layout.storage_axes(Role.FFN) if sizes[axis] > 1}
    gather = {axis for axis in phase.gather if sizes[axis] > 1}
    if not gather:
        return "ws-2d" if embed and ffn else "other" if embed else "ws-1d"
    if gather == embed | ffn:
        return "wg-xyz"
    if embed and gather == embed:
        return "wg-x"
    if embed and gather > embed:
        return "wg-xy"
    return "other"


def attention_name(phase: Phase, sizes: Mapping[str, int]) -> str:
    """heads, batch or sequence when all axes of size > 1 that split anything have that role; otherwise mixed (or none)."""
    roles = {role for axis, role in phase.attention if sizes[axis] > 1 and role is not AttentionRole.NONE}
    if len(roles) == 1:
        return next(iter(roles)).value
    return "mixed" if roles else "heads"


def readable_name(layout: Layout, sizes: Mapping[str, int]) -> str:
    """One line for tables: storage in the paper's notation, then FFN and attention of each phase."""
    embed = "".join(axis for axis in layout.storage_axes(Role.EMBED) if sizes[axis] > 1)
    ffn = "".join(axis for axis in layout.storage_axes(Role.FFN) if sizes[axis] > 1)
    copies = "".join(axis for axis in layout.storage_axes(Role.REPLICA) if sizes[axis] > 1)
    stages = "".join(axis for axis in layout.storage_axes(Role.STAGE) if sizes[axis] > 1)
    stored = f"E{'_' + embed if embed else ''} F{'_' + ffn if ffn else ''}" + (f", copies over {copies}" if copies else "")
    stored += f", stages over {stages}" if stages else ""
    stored += f", experts {experts_name(layout, sizes)}" if layout.experts else ""
    return ", ".join([stored, *(_phase_name(layout, label, sizes) for label in PHASES)])


def experts_name(layout: Layout, sizes: Mapping[str, int]) -> str:
    """How experts' matrices are split, `X_y F_z`; `X` where every device has all of them whole."""
    letters = (("X", ExpertRole.EXPERT), ("E", ExpertRole.EMBED), ("F", ExpertRole.FFN))
    split = ((letter, "".join(axis for axis in layout.expert_axes(role) if sizes[axis] > 1)) for letter, role in letters)
    return " ".join(f"{letter}_{axes}" for letter, axes in split if axes) or "X"


def _phase_name(layout: Layout, label: str, sizes: Mapping[str, int]) -> str:
    """`decode ws-1d/batch`, and what the phase does about experts where it is not the plainest."""
    phase = layout.phase(label)
    name = f"{label} {ffn_name(layout, phase, sizes)}/{attention_name(phase, sizes)}"
    gathered = "".join(axis for axis in phase.gather_experts if sizes[axis] > 1)
    sent = [axis for axis in layout.expert_splits(phase, ExpertRole.EXPERT) if sizes[axis] > 1 and axis in layout.token_axes(phase)]
    name += f"/experts gathered over {gathered}" if gathered else ""
    return name + ("/rows exchanged" if sent and phase.dispatch is Dispatch.EXCHANGE else "")
