"""The input and output of a runner for one iteration. Plain frozen data, the same for every runner.

A step mixes decode rows (one token of a sequence that is past its prompt) and prefill chunks (consecutive prompt tokens). A row names
its sequence by `slot`, the number of its lane among the resident sequences, and `shard`, the shard of the decode batch axes that owns
its KV pages. The cache has groups (`RunnerLimits.groups`), and a row one page table for each. Page ids are global within a group: page p
of shard s is s * pages_per_shard + p. Where sequence axes split shards, page i of a sequence lies on sequence shard i modulo
their number. Positions count from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How one row picks its token.

    The random key is (seed, sample_index, position of the token that is predicted): nothing of the batch enters it.

    Attributes:
        temperature: 0 picks the most likely token. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
        seed: 0 ≤ seed < 2³². sample_index: which of a request's parallel samples this is.
        presence, frequency, repetition: penalties. top_logprobs: alternatives that are wanted with the token.
        adjusted: penalties, biases or a least length adjust its logits, so its slot is started (`SlotStart`) before it runs and counts
            tokens.
        ends_from: position of the first token that may be one of `SlotStart.ends`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    top_logprobs: int = 0
    adjusted: bool = False
    ends_from: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def extended(self) -> bool:
        """Whether it needs a step with extended sampling (`partinf.plans.Bucket.extended`)."""
        return self.adjusted or self.top_logprobs > 0


class SlotStart(NamedTuple):
    """What a runner must know of a sequence with adjusted logits that became resident, before its first row.

    Attributes:
        prompt, generated: its tokens so far, those that are to be computed again included. Later ones are counted as they are fed.
        logit_bias: token and value, each token once. ends: tokens that are not chosen before `RowSampling.ends_from`, at most MAX_ENDS.
    """

    slot: int
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    logit_bias: tuple[tuple[int, float], ...]
    ends: tuple[int, ...] = ()


class PageTable(NamedTuple):
    """Where the keys and values of a sequence lie in one group of the cache.

    Attributes:
        ids: pages in the order of positions. first: which page of the sequence the first of them is; those before have been let go.
    """

    ids: tuple[int, ...]
    first: int = 0


class DecodeRow(NamedTuple):
    """One token of one sequence: its K/V are written at `position`, the token at position + 1 is sampled.

    A named tuple, because serving makes one per token.

    Attributes:
        token: the token fed; None takes the one last sampled in this slot, which the host has not seen yet.
        tables: of every group, the pages up to `position`, from 0 or the first that a query there can see.
        counts: the token fed is one that its slot has not counted yet: sampled since the slot was started. Only if `sampling.adjusted`.
        mask: the tokens that may be sampled: bit i modulo 8 of byte i // 8 stands for token i, and those beyond its end may not. None
            where all may.
    """

    slot: int
    shard: int
    token: int | None
    position: int
    tables: tuple[PageTable, ...]
    sampling: RowSampling
    counts: bool = False
    mask: bytes | None = None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive tokens of one sequence: their K/V are written at start..start + len(tokens) - 1.

    Attributes:
        shard: the shard that owns the pages.
        start: position of the first token; what lies before it was written by earlier steps.
        tables: of every group, the pages up to position start + len(tokens) - 1, from 0 or the first that a query at `start` can see.
        last: the prompt ends with this chunk, so the token at start + len(tokens) is sampled.
        prefill_shard: the shard of the prefill batch axes that computes this chunk, one of `RunnerLimits.prefill_shards_of(shard)`.
        targets: prompt tokens that follow each of `tokens`, where their log-probabilities are wanted; as long as `tokens`, or one shorter
            where the prompt ends. Empty for none.
        mask: as `DecodeRow.mask`; of a chunk that is the last.
    """

    slot: int
    shard: int
    tokens: tuple[int, ...]
    start: int
    tables: tuple[PageTable, ...]
    last: bool
    sampling: RowSampling
    prefill_shard: int = 0
    targets: tuple[int, ...] = ()
    mask: bytes | None = None

    @property
    def end(self) -> int:
        """Position after the last token of the chunk."""
        return self.start + len(self.tokens)


class PageCopy(NamedTuple):
    """KV pages of one sequence in one group that move between the device and host memory, page by page in the same order.

    Attributes:
        pages: global page ids. host_pages: places in the group's host memory, 0..num_host_pages - 1. shard: owner of the pages, the same
            both ways. group: which of `RunnerLimits.groups`. first: which page of the sequence the first of them is.
    """

    pages: tuple[int, ...]
    host_pages: tuple[int, ...]
    shard: int
    group: int = 0
    first: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One iteration. No slot occurs twice.

    Copies come before the rows: first all of `swap_out`, whose pages are free afterwards, then all of `swap_in`. A step may consist of
    copies alone. Slots are started before the rows too. Of a sequence the pages of all groups are copied, or none.

    Attributes:
        swap_out: from the device to host memory. swap_in: back.
        starts: slots of this step's rows that begin to count.
        idle_rows, idle_tokens: decode rows and prompt tokens of padding that the policy asks for: what a batch that runs to the end of its
            longest member spends on the others. A runner that pads by its own rules may ignore them.
    """

    decode: tuple[DecodeRow, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    swap_out: tuple[PageCopy, ...] = ()
    swap_in: tuple[PageCopy, ...] = ()
    starts: tuple[SlotStart, ...] = ()
    idle_rows: int = 0
    idle_tokens: int = 0

    @property
    def rows(self) -> tuple[DecodeRow | PrefillChunk, ...]:
        """Decode rows, then chunks."""
        return (*self.decode, *self.prefill)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.prefill)

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the linear layers, without padding."""
        return len(self.decode) + self.num_prefill_tokens

    @property
    def num_rows(self) -> int:
        """Sequences that take part."""
        return len(self.decode) + len(self.prefill)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill or self.swap_out or self.swap_in)


class SampledToken(NamedTuple):
    """A token and its log-probability (natural, of the model's distribution before penalties, temperature and truncation).

    Attributes:
        token: -1 if none could be chosen, because logits are NaN or infinite.
        top: the most likely tokens with theirs, most likely first, as many as were wanted.
    """

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class PromptScore(NamedTuple):
    """The log-probability of a prompt's token, and the likeliest token in its place with its own."""

    logprob: float
    top_token: int
    top_logprob: float


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The result of one step.

    Attributes:
        decode: in the order of `Step.decode`.
        prefill: in the order of `Step.prefill`; None for a chunk that was not the last of its prompt.
        prompt_scores: in the order of `Step.prefill`, of each chunk's targets; empty when no chunk has any.
        padded_tokens: tokens that really went through the linear layers, padding included; 0 when the runner does not pad.
        seconds: time that the step took on the device; 0 when the runner does not know it.
        stages: from when to when each pipeline stage worked on the step, on the engine's clock; empty when the runner does not know, or has
            one stage.
    """

    decode: tuple[SampledToken, ...] = ()
    prefill: tuple[SampledToken | None, ...] = ()
    prompt_scores: tuple[tuple[PromptScore, ...], ...] = ()
    padded_tokens: int = 0
    seconds: float = 0.0
    stages: tuple[tuple[float, float], ...] = ()
