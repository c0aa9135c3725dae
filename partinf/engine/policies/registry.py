"""Policies by the names that the command line knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from partinf.engine.estimates import Estimates
from partinf.engine.policies.fcfs import FirstComeFirstServed
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.orca import Orca
from partinf.engine.policies.priority import by_priority
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.engine.policies.request_level import RequestLevel
from partinf.engine.policies.srpt import shortest_remaining_first
from partinf.errors import InvalidInput, nearest

if TYPE_CHECKING:
    from partinf.engine.batch import Policy

POLICIES = {
    "request-level": "static batches, prompts padded to the longest, returned together",
    "fastertransformer": "static batches, prefilled to the shortest prompt, then token by token",
    "orca": "iterations in order of arrival, pages reserved for the longest answer",
    "fcfs": "iterations in order of arrival, pages on demand, the newest is preempted",
    "fcfs-chunked": "the same with prompts cut to fill every step",
    "mlfq": "skip-join multi-level feedback queue (FastServe)",
    "mlfq-naive": "multi-level feedback queue that everybody joins at the top",
    "srpt": "shortest remaining processing time, an oracle",
    "priority": "by the priority that a request names, then by arrival",
}

PREEMPTIVE = ("mlfq", "mlfq-naive", "srpt", "priority")


@dataclass(frozen=True)
class PolicyOptions:
    """What policies can be told.

    Attributes:
        max_batch_size: sequences per iteration. alpha: seconds after which mlfq promotes. eviction, reserve: see `Pages`.
    """

    max_batch_size: int
    alpha: float = 0.3
    eviction: Eviction = Eviction.RECOMPUTE
    reserve: float = 0.1


def resident_batches(name: str) -> int:
    """How many full batches may hold pages at once: more than the one that runs, where a policy gives one request's place to another."""
    return 4 if name in PREEMPTIVE else 1


def make_policy(name: str, options: PolicyOptions, estimates: Estimates) -> Policy:
    """A new policy, for one engine.

    Raises:
        InvalidInput: an unknown name (nearest one).
    """
    most = options.max_batch_size
    pages = Pages(options.eviction, estimates, options.reserve)
    if name not in POLICIES:
        raise InvalidInput(f"scheduler '{name}'{nearest(name, POLICIES)}")
    if name in ("mlfq", "mlfq-naive"):
        return MultiLevelFeedbackQueue(estimates, most, name == "mlfq", options.alpha, pages)
    if name == "srpt":
        return shortest_remaining_first(estimates, most, pages)
    if name == "priority":
        return by_priority(most, pages)
    if name in ("request-level", "fastertransformer"):
        return RequestLevel(most, shortest_prefill=name == "fastertransformer")
    return Orca(most) if name == "orca" else FirstComeFirstServed(most, chunk_prefills=name == "fcfs-chunked")
