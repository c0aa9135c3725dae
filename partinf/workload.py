"""What is to be served: batch, lengths and objective."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from partinf.foundation.errors import raise_offences
from partinf.foundation.limits import MAX_BATCH, MAX_LEN, MAX_RATE, MAX_SECONDS, MIN_RATE, not_whole
from partinf.foundation.rounding import ceil_div

SERVED_PROMPT_TOKENS = 256
"""Prompt tokens per step of a serving engine, unless another number is given."""


class Objective(StrEnum):
    """LATENCY: shortest step (or request). THROUGHPUT: most tokens per second. COST: fewest chip-seconds per token."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"
    COST = "cost"


class DType(StrEnum):
    """Storage types of weights and KV cache."""

    BF16 = "bf16"
    INT8 = "int8"
    F32 = "f32"

    @property
    def num_bytes(self) -> int:
        return {DType.BF16: 2, DType.INT8: 1, DType.F32: 4}[self]

    @property
    def activations(self) -> DType:
        """The type of activations, norms, biases and tables where matrices are stored in this one."""
        return DType.F32 if self is DType.F32 else DType.BF16


@dataclass(frozen=True)
class Workload:
    """A batch of requests of equal lengths, the unit for which a layout is chosen.

    Attributes:
        batch: B, sequences decoded together.
        input_len: prompt tokens per request (prefill).
        output_len: generated tokens per request; 0 for scoring.
        context_len: tokens in the cache when one decode step is judged; None means input plus half of the output.
        phase: `prefill` or `decode` to judge one step of that phase; None for the whole workload.
        weights, kv: storage types.
        max_latency: bound in seconds on the step (single phase) or the whole request; None for no bound.
        prefill_batch: prompts of one prefill step; None for the whole batch. Prompts that come one by one are prefilled at 1 and then
            decode together, `batch` of them.
        arrival_rate: requests per second that come in, for advice on the batch; None where that is not known.
        resident: sequences of full length that the cache must hold; None for the whole batch. A scheduler that preempts does with fewer.
        chunk: prompt tokens that one step processes at most, which is what activations are counted for; None for whole prompts.
    """

    batch: int
    input_len: int = 0
    output_len: int = 0
    context_len: int | None = None
    phase: str | None = None
    weights: DType = DType.BF16
    kv: DType = DType.BF16
    objective: Objective = Objective.LATENCY
    max_latency: float | None = None
    prefill_batch: int | None = None
    arrival_rate: float | None = None
    resident: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        offences = not_whole("batch", self.batch, 1, MAX_BATCH)
        if self.prefill_batch is not None:
            offences += not_whole("prefill batch", self.prefill_batch, 1, MAX_BATCH)
        if self.resident is not None:
            offences += not_whole("resident", self.resident, 1, self.batch)
        if self.chunk is not None:
            offences += not_whole("chunk", self.chunk, 1, MAX_LEN)
        for key in ("input_len", "output_len", "context_len"):
            value = getattr(self, key)
            if value is not None:
                offences += not_whole(key.removesuffix("_len"), value, 0, MAX_LEN)
        if not offences and self.input_len + self.output_len > MAX_LEN:
            offences.append(f"input + output = {self.input_len + self.output_len}; a request has at most {MAX_LEN:,} tokens")
        if self.phase not in (None, "prefill", "decode"):
            offences.append(f"phase = {self.phase!r}; valid: prefill, decode, or neither for the whole workload")
        if self.phase in (None, "prefill") and self.input_len == 0 and not self.context_len:
            offences.append("input = 0; prefill needs a prompt length of at least 1")
        if self.max_latency is not None and not 0 < self.max_latency <= MAX_SECONDS:
            offences.append(f"max latency = {self.max_latency} s; it must be positive, and at most {MAX_SECONDS:g} s")
        if self.arrival_rate is not None:
            if not MIN_RATE <= self.arrival_rate <= MAX_RATE:
                offences.append(f"arrival rate = {self.arrival_rate} per second; it must be positive: {MIN_RATE:g} to {MAX_RATE:g}")
            if self.phase or self.output_len == 0:
                offences.append("an arrival rate needs the whole workload: input and output lengths, and no phase")
        raise_offences(offences)

    @property
    def decode_context(self) -> int:
        """M of the decode step by which layouts are judged."""
        if self.context_len is not None:
            return self.context_len
        return self.input_len + self.output_len // 2

    @property
    def max_context(self) -> int:
        """Tokens per request that the cache must hold at the end."""
        return max(self.context_len or 0, self.input_len + self.output_len)

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one prefill step."""
        return min(self.prefill_batch or self.batch, self.batch)

    @property
    def num_prefills(self) -> int:
        """Prefill steps that a decoded batch needs."""
        return ceil_div(self.batch, self.prompts_per_step)

    @property
    def counted_prefills(self) -> int:
        """Prefill steps by which layouts are judged: a request waits for its own, throughput and cost count all of them."""
        return 1 if self.objective is Objective.LATENCY else self.num_prefills
