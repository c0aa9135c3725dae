"""The table of policies: what the command line, its checks, descriptions of experiments and the tests know of each.

A new policy is a file (`priority.py` shows one that is a rank for `Ranked`) and a row here; the property tests draw from this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from partinf.engine.batch import Policy
from partinf.engine.estimates import Estimates
from partinf.engine.policies.fcfs import FirstComeFirstServed
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.orca import Orca
from partinf.engine.policies.priority import by_priority
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.engine.policies.request_level import RequestLevel
from partinf.engine.policies.srpt import shortest_remaining_first
from partinf.foundation.errors import InvalidInput, nearest


@dataclass(frozen=True)
class PolicyOptions:
    """The options of policies.

    Attributes:
        max_batch_size: sequences per iteration. alpha: seconds after which mlfq promotes. eviction, reserve: see `Pages`.
    """

    max_batch_size: int
    alpha: float = 0.3
    eviction: Eviction = Eviction.RECOMPUTE
    reserve: float = 0.1

    def pages(self, estimates: Estimates) -> Pages:
        return Pages(self.eviction, estimates, self.reserve)


@dataclass(frozen=True)
class NamedPolicy:
    """One policy.

    Attributes:
        text: what it does, in a line. make: a new one, for one engine.
        preemptive: it gives one request's place to another, so more requests may hold pages than run, and `eviction` is a choice.
        reads_clock: its schedule depends on the time, which differs from process to process and from run to run. (Proactive eviction reads
            it under any policy: pages move as fast as the link has carried them.)
    """

    text: str
    make: Callable[[PolicyOptions, Estimates], Policy]
    preemptive: bool = False
    reads_clock: bool = False


POLICIES: Mapping[str, NamedPolicy] = {
    "request-level": NamedPolicy(
        "static batches, prompts padded to the longest, returned together", lambda o, _: RequestLevel(o.max_batch_size)
    ),
    "fastertransformer": NamedPolicy(
        "static batches, prefilled to the shortest prompt, then token by token",
        lambda o, _: RequestLevel(o.max_batch_size, shortest_prefill=True),
    ),
    "orca": NamedPolicy("iterations in order of arrival, pages reserved for the longest answer", lambda o, _: Orca(o.max_batch_size)),
    "fcfs": NamedPolicy(
        "iterations in order of arrival, pages on demand, the newest is preempted", lambda o, _: FirstComeFirstServed(o.max_batch_size)
    ),
    "fcfs-chunked": NamedPolicy(
        "the same with prompts cut to fill every step", lambda o, _: FirstComeFirstServed(o.max_batch_size, chunk_prefills=True)
    ),
    "mlfq": NamedPolicy(
        "skip-join multi-level feedback queue (FastServe)",
        lambda o, e: MultiLevelFeedbackQueue(e, o.max_batch_size, True, o.alpha, o.pages(e)),
        preemptive=True,
        reads_clock=True,
    ),
    "mlfq-naive": NamedPolicy(
        "multi-level feedback queue that every request joins at the top",
        lambda o, e: MultiLevelFeedbackQueue(e, o.max_batch_size, False, o.alpha, o.pages(e)),
        preemptive=True,
        reads_clock=True,
    ),
    "srpt": NamedPolicy(
        "shortest remaining processing time, an oracle",
        lambda o, e: shortest_remaining_first(e, o.max_batch_size, o.pages(e)),
        preemptive=True,
    ),
    "priority": NamedPolicy(
        "by the priority that a request names, then by arrival",
        lambda o, e: by_priority(o.max_batch_size, o.pages(e)),
        preemptive=True,
    ),
}

PREEMPTIVE = tuple(name for name, policy in POLICIES.items() if policy.preemptive)
TIMELESS = tuple(name for name, policy in POLICIES.items() if not policy.reads_clock)


def described() -> str:
    """All of them with what they do, for a help text."""
    return "; ".join(f"{name}: {policy.text}" for name, policy in POLICIES.items())


def resident_batches(name: str) -> int:
    """How many full batches may hold pages at once: more than the one that runs, where a policy gives one request's place to another."""
    return 4 if POLICIES[name].preemptive else 1


def make_policy(name: str, options: PolicyOptions, estimates: Estimates) -> Policy:
    """A new policy, for one engine.

    Raises:
        InvalidInput: an unknown name (nearest one).
    """
    if name not in POLICIES:
        raise InvalidInput(f"scheduler '{name}'{nearest(name, POLICIES)}")
    return POLICIES[name].make(options, estimates)
