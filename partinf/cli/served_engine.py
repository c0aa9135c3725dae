"""The engine that `serve` runs, as its flags say it.

`serve` makes it over devices and `simulate --as-served` over the cost model. Whatever decides what a step holds is declared, read and
made here alone, so that both have the same scheduler, share of prompts in a step, buckets and bounds.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from partinf.cli.flags import Flags, OnOff
from partinf.foundation.limits import MAX_BATCH, MAX_LEN, MAX_REQUESTS
from partinf.workload import SERVED_PROMPT_TOKENS

if TYPE_CHECKING:
    from partinf.cli.model_place import ModelPlace
    from partinf.engine.engine import Engine
    from partinf.engine.estimates import Estimates
    from partinf.engine.runner import Runner
    from partinf.plans import Plan

SCHEDULER = "fcfs-chunked"
_DEFAULT_ROWS = 32
_MOST_MASK_THREADS = 2
_BUSY_CORES = 2  # by the engine's thread and the event loop
_RANGES = {
    "max_num_seqs": (1, MAX_BATCH),
    "max_num_batched_tokens": (1, MAX_LEN),
    "lag": (0, 1024),
    "mask_threads": (0, 64),
    "max_waiting": (1, MAX_REQUESTS),
    "max_waiting_tokens": (1, (1 << 63) - 1),
}
FLAGS = (*_RANGES, "enable_prefix_caching")
"""What `add_engine_arguments` declares, by the names that argparse gives them; None where a flag is absent."""


class _Group(Protocol):
    """A parser, or a group of its arguments."""

    def add_argument(self, *names: str, **how: Any) -> argparse.Action: ...


def add_engine_arguments(group: _Group) -> None:
    """The flags of the engine but for its scheduler, which other commands have too."""
    group.add_argument("--max-num-seqs", metavar="N", help=f"sequences per iteration (default: {_DEFAULT_ROWS})")
    text = f"tokens per iteration: one for each sequence, the rest for prompts (default: {SERVED_PROMPT_TOKENS} for prompts)"
    group.add_argument("--max-num-batched-tokens", metavar="N", help=text)
    sharing = "share KV pages of common prompt prefixes (default: yes)"
    group.add_argument("--enable-prefix-caching", action=OnOff, default=None, help=sharing)
    lag = "steps in flight, beyond one per pipeline stage, before the oldest is awaited (default: 1)"
    group.add_argument("--lag", metavar="N", help=lag)
    masks = "threads that compute the token masks of slow grammars; 0: the engine computes all between steps (default: 1, 2 on 4 cores)"
    group.add_argument("--mask-threads", metavar="N", help=masks)
    group.add_argument("--max-waiting", metavar="N", help="requests that may wait; more get a 429 (default: 512)")
    group.add_argument("--max-waiting-tokens", metavar="N", help="prompt tokens that may wait (default: unlimited)")


def default_mask_threads() -> int:
    """Threads for masks that are not quick to have: one, and another where it has a core of its own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_MASK_THREADS, max(1, cores - _BUSY_CORES))


@dataclass(frozen=True)
class ServedEngine:
    """Everything about an engine that serves but its model and who executes its steps.

    Attributes:
        rows: sequences per iteration. prompt_tokens: of prompts, per iteration.
        mask_threads: that find out what may follow in answers whose grammars take long; started with the first such answer.
    """

    scheduler: str
    rows: int
    prompt_tokens: int
    lag: int
    mask_threads: int
    max_waiting: int
    max_waiting_tokens: int | None
    prefix_caching: bool

    @classmethod
    def read(cls, flags: Flags) -> ServedEngine:
        """What the flags say; what is wrong with them joins their offences."""
        from partinf.engine.policies.registry import POLICIES

        scheduler = flags.word("scheduler", POLICIES)
        found = {name: flags.optional_whole(name, low, high) for name, (low, high) in _RANGES.items()}
        rows, tokens = found["max_num_seqs"] or _DEFAULT_ROWS, found["max_num_batched_tokens"]
        if tokens is not None and tokens <= rows:
            flags.offences.append(f"--max-num-batched-tokens {tokens}; it must be above --max-num-seqs, which is {rows}")
        return cls(
            scheduler=scheduler,
            rows=rows,
            prompt_tokens=SERVED_PROMPT_TOKENS if tokens is None else max(1, tokens - rows),
            lag=1 if found["lag"] is None else found["lag"],
            mask_threads=default_mask_threads() if found["mask_threads"] is None else found["mask_threads"],
            max_waiting=found["max_waiting"] or 512,
            max_waiting_tokens=found["max_waiting_tokens"],
            prefix_caching=flags.args.enable_prefix_caching is not False,
        )

    def plan(self, place: ModelPlace) -> Plan:
        """The plan of what is served there: programs for whatever a request may ask for, and a layout, where none is given, for requests
        that come one by one.

        Raises:
            InvalidInput: as `ModelPlace.plan`.
        """
        return place.plan(self.rows, random=True, prefill_tokens=self.prompt_tokens, extended=True, constrained=True, prefill_batch=1)

    def engine(self, runner: Runner, estimates: Estimates, **own: Any) -> Engine:
        """An engine over who executes its steps.

        Args:
            own: further arguments of `Engine`: tokenizer, clock, replicas, …
        """
        from partinf.engine.engine import Engine
        from partinf.engine.policies.registry import PolicyOptions, make_policy

        return Engine(
            runner,
            policy=make_policy(self.scheduler, PolicyOptions(self.rows), estimates),
            lag=self.lag,
            prefix_caching=self.prefix_caching,
            max_waiting=self.max_waiting,
            max_waiting_tokens=self.max_waiting_tokens,
            num_mask_threads=self.mask_threads,
            **own,
        )
