"""The boundary between the engine and whatever executes a step: the model in JAX, a cost model with a virtual clock, or a fake."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from partinf.engine.step import Step, StepOutput
from partinf.foundation.errors import raise_offences
from partinf.foundation.limits import MAX_BATCH, MAX_PAGES, outside
from partinf.foundation.paging import chunk_pages, window_pages
from partinf.foundation.rounding import ceil_div


@dataclass(frozen=True)
class PageGroup:
    """Pages of one group of the cache.

    Attributes:
        window: positions that a query sees of what lies there, the latest ones, its own included; 0 for all.
        pages_per_shard: as in `RunnerLimits`. num_host_pages: pages of host memory.
    """

    window: int
    pages_per_shard: int
    num_host_pages: int = 0


@dataclass(frozen=True)
class RunnerLimits:
    """What a step may hold.

    Attributes:
        max_decode_rows_per_shard: decode rows of one shard of the decode batch axes; so many sequences per stage may live on a shard.
        max_prefill_tokens: prefill tokens of a step, in equal blocks over the prefill shards.
        max_prefill_slots_per_shard: prefill chunks of one *prefill* shard.
        page_size: tokens per KV page. pages_per_shard: pages owned by each of the `num_shards` shards of the decode batch axes, of the
            group that keeps all positions; 0 where there is none. windows: the groups that keep a window each.
        num_sequence_shards: shards of the decode sequence axes within each of those, of as many pages each; page i of a sequence lies on
            sequence shard i modulo this.
        num_slots: sequences that may be resident. max_len: longest context in tokens, prompt and output together.
        vocab_size: token ids are 0..vocab_size - 1.
        num_prefill_shards: shards of the prefill batch axes; a chunk is computed on one of them.
        prefill_shards: per decode shard, the prefill shards that may compute its chunks (those that agree with it on the axes which
            are batch axes in both phases); empty when any may.
        num_stages: pipeline stages: so many steps fill the pipeline, and a token that a step samples can be fed by the one that comes as
            many steps later.
        num_host_pages: pages of host memory for sequences that are swapped out, 0 when the runner cannot swap; of the group that keeps all
            positions.
        chunks: whether a prompt may be cut and continued by later steps; if not, one step's share is the longest prompt.
        random: whether rows may sample. extended: whether they may have penalties, biases, alternatives and log-probabilities of prompts.
        constrained: whether rows may have a mask of the tokens that they may sample.
    """

    max_decode_rows_per_shard: int
    max_prefill_tokens: int
    max_prefill_slots_per_shard: int
    page_size: int
    pages_per_shard: int
    num_shards: int
    num_slots: int
    max_len: int
    vocab_size: int
    num_sequence_shards: int = 1
    num_prefill_shards: int = 1
    prefill_shards: tuple[tuple[int, ...], ...] = ()
    chunks: bool = True
    random: bool = True
    extended: bool = True
    constrained: bool = True
    num_stages: int = 1
    num_host_pages: int = 0
    windows: tuple[PageGroup, ...] = ()

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int) and not isinstance(value, bool)}
        least = dict.fromkeys(numbers, 1) | {"num_host_pages": 0, "pages_per_shard": 0 if self.windows else 1}
        offences = [f"{name} = {value}; it must be at least {least[name]}" for name, value in numbers.items() if value < least[name]]
        if not offences and self.max_prefill_tokens % self.num_prefill_shards:
            offences.append(f"max_prefill_tokens = {self.max_prefill_tokens} does not divide over {self.num_prefill_shards} prefill shards")
        if not offences:
            offences += [
                f"pages_per_shard = {group.pages_per_shard} does not divide over {self.num_sequence_shards} sequence shards"
                for group in self.groups
                if group.pages_per_shard % self.num_sequence_shards
            ]
        if self.prefill_shards and len(self.prefill_shards) != self.num_shards:
            offences.append(f"prefill_shards has {len(self.prefill_shards)} entries for {self.num_shards} shards")
        for shard, allowed in enumerate(self.prefill_shards):
            if not allowed or not set(allowed) <= set(range(self.num_prefill_shards)):
                offences.append(f"prefill_shards[{shard}] = {allowed}; valid: some of 0..{self.num_prefill_shards - 1}")
        if not offences:  # the pool keeps lists of so many
            for group in self.groups:
                offences += outside("pages of all shards", group.pages_per_shard * self.num_shards, 1, MAX_PAGES)
                offences += outside("num_host_pages", group.num_host_pages, 0, MAX_PAGES)
            offences += outside("num_slots", self.num_slots, 1, MAX_BATCH) + [line for one in self.windows for line in self._too_few(one)]
        raise_offences(f"runner limits: {offence}" for offence in offences)

    def _too_few(self, group: PageGroup) -> list[str]:
        """Why the pages of a window's group hold no sequence that runs alone."""
        needed = (self.reserved_pages(group.window, self.max_len) + self.chunk_pages) * self.num_sequence_shards
        if group.window > 0 and needed <= group.pages_per_shard:
            return []
        return [f"window of {group.window}: {group.pages_per_shard} pages per shard; one sequence needs up to {needed}"]

    @cached_property
    def groups(self) -> tuple[PageGroup, ...]:
        """The groups of the cache: the one that keeps all positions, if there is one, then the windows."""
        whole = (PageGroup(0, self.pages_per_shard, self.num_host_pages),) if self.pages_per_shard else ()
        return whole + self.windows

    def reserved_pages(self, window: int, num_positions: int) -> int:
        """Pages per sequence shard that a window's group keeps for a sequence of so many positions."""
        return window_pages(window, num_positions, self.page_size, self.num_sequence_shards)

    @cached_property
    def chunk_pages(self) -> int:
        """Pages per sequence shard of a window's group that prompts of one step take while it is put together, beyond what is
        reserved for them."""
        most = max(map(len, self.prefill_shards), default=self.num_prefill_shards)  # prefill shards that compute for one decode shard
        tokens, chunks = self.max_prefill_tokens_per_shard * most, self.max_prefill_slots_per_shard * most
        return chunk_pages(tokens, chunks, self.page_size, self.num_sequence_shards)

    @property
    def max_prefill_tokens_per_shard(self) -> int:
        """Longest chunk: prefill tokens of one prefill shard."""
        return self.max_prefill_tokens // self.num_prefill_shards

    @property
    def max_context(self) -> int:
        """Longest sequence that can be served, prompt and output together: `max_len`, or what the pages of one shard hold if less."""
        return min(self.max_len, self.pages_per_shard * self.page_size) if self.pages_per_shard else self.max_len

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt that can be served: it leaves a token to generate, and fits one step where prompts are not cut."""
        return min(self.max_context - 1, self.max_context if self.chunks else self.max_prefill_tokens_per_shard)

    def place_of(self, page: int, group: int = 0) -> tuple[int, int]:
        """Shard and sequence shard in which a page of a group lies."""
        return divmod(page // (self.groups[group].pages_per_shard // self.num_sequence_shards), self.num_sequence_shards)

    def prefill_shards_of(self, shard: int) -> tuple[int, ...]:
        """The prefill shards that may compute chunks of sequences owned by this decode shard."""
        return self.prefill_shards[shard] if self.prefill_shards else tuple(range(self.num_prefill_shards))

    def pages_for(self, num_positions: int) -> int:
        """Pages that hold this many tokens."""
        return ceil_div(num_positions, self.page_size)


class Runner(Protocol):
    """Executes steps in the order of submission.

    Methods are called from one thread at a time, though not always the same one. An exception from `submit` or `collect` fails every
    request in flight; the engine then calls `reset` and goes on with new requests.
    """

    @property
    def limits(self) -> RunnerLimits: ...

    def submit(self, step: Step) -> None:
        """Start a step; may return before it has run."""
        ...

    def collect(self) -> StepOutput:
        """Wait for the oldest step that was submitted and not yet collected."""
        ...

    def reset(self) -> None:
        """Forget every step that was submitted and not collected."""
        ...
