"""A request on its way: its input (`Request`), its state (`Sequence`), its output (`RequestOutput`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from partinf.engine.params import SamplingParams as SamplingParams
from partinf.engine.step import PageTable, PromptScore, RowSampling, SampledToken


class FinishReason(StrEnum):
    """STOP: end-of-sequence, a stop token or a stop string. LENGTH: max_tokens or the context is used up. TIMEOUT: the request's time was
    over. FAILED: `error` says why."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    FAILED = "failed"


@dataclass(frozen=True)
class TokenEvent:
    """What a stream yields: one per generated token, and one without a token when a request ends without one (cancelled, failed).

    Attributes:
        sample: which of the request's n samples. top_logprobs: the most likely tokens here, if they were requested.
        token: None when the request ended without another token.
        index: which of the generated tokens, from 0.
        text: what this token adds to the text; may be empty (part of a character, or of a possible stop string), may hold the text of
            earlier tokens. The texts of all events joined are the text of the output.
        prompt_scores: of the prompt's tokens, with the first event of a sample, if they were requested.
        finish_reason: set on the last event of a sample. error: what went wrong, when it is FAILED.
    """

    request_id: str
    token: int | None
    index: int
    text: str = ""
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    sample: int = 0
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    prompt_scores: tuple[PromptScore | None, ...] | None = None


@dataclass(frozen=True)
class Request:
    """A request that has been checked, or one of its samples: they have their id in common.

    Attributes:
        number: order of arrival, from 0, of every sample. prompt: token ids, at least one.
        max_tokens: `params.max_tokens`, or what the context leaves if less.
        sampling: what the runner needs of `params`, the seed chosen.
        arrival: time of `Engine.add_request` on the engine's clock, in seconds.
        ends: token ids that end its text. sample: which of `params.n`.
        mask: of the tokens that may come first (`engine.constraint`); None where all may, now and later.
    """

    id: str
    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    sampling: RowSampling
    arrival: float
    ends: tuple[int, ...] = ()
    sample: int = 0
    mask: bytes | None = None

    @property
    def max_positions(self) -> int:
        """Positions that get K/V at most: all tokens but the last sampled one, which is never fed."""
        return len(self.prompt) + self.max_tokens - 1


class Status(StrEnum):
    """WAITING: holds nothing. RUNNING: holds a slot and pages. SWAPPED: holds pages in host memory. HELD: has all its tokens and holds
    nothing, but is not returned before its batch is done. FINISHED: holds nothing again."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    HELD = "held"
    FINISHED = "finished"


@dataclass(slots=True)
class HeldPages:
    """The pages that a sequence holds in one group of the cache.

    Attributes:
        first: which page of the sequence the first of them is; those before have been let go. pages: global ids, in the order of positions.
        host_pages: places in host memory while it is swapped out. reserved: pages per sequence shard that the group keeps for it.
    """

    first: int = 0
    pages: list[int] = field(default_factory=list)
    host_pages: list[int] = field(default_factory=list)
    reserved: int = 0

    @property
    def end(self) -> int:
        """Which page of the sequence comes after the last of them."""
        return self.first + len(self.pages)


@dataclass(eq=False)
class Sequence:
    """The mutable state of one request.

    Two counts move at different times: `num_scheduled` when a step is scheduled, `tokens` when its output is committed. In between,
    the token to feed next is known to the device only.

    Attributes:
        tokens: the prompt, then every token sampled so far. pieces: the text given out so far, in pieces.
        slot, shard: the lane and the shard that owns the pages; -1 while it holds none.
        home: the shard from which its pages went to host memory, and to which they come back.
        digests: of the token prefixes that fill whole pages, made as they are needed.
        held: its pages, by group of the cache. num_covered: positions for which it has pages in all groups.
        max_positions: positions that get K/V at most.
        num_scheduled: positions whose K/V are written by the steps scheduled so far, or were found in the prefix cache.
        num_readable: positions that steps built so far have written; another sample of the request may share their pages.
        prefill_len: tokens known when the sequence was admitted last; what lies beyond is sampled and decoded one by one.
        num_cached: tokens of the prompt that were not computed when it was admitted first, because their pages were there.
        num_iterations: steps that this sequence took part in. num_preemptions: times that it lost its pages.
        in_flight: steps with this sequence that are scheduled and not committed, and one more while it is `unmasked`. last_step: number of
            the last of them.
        mask: of the tokens that may come next; None where all may. unmasked: that is not known yet for its last token.
        attained: seconds that its steps took so far.
        family: all samples of the request, this one included, the one that computes the prompt first; empty for a single one.
        shared_len: tokens of the prompt whose pages are shared with the first.
        top_logprobs: of each generated token, if requested. prompt_scores: of each prompt token, None where not known.
        scoring: log-probabilities of the prompt are still to be computed. started_slot: its slot counts its tokens.
        started, first_token, last_token, finished: times on the engine's clock, in seconds; None until it happens.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    status: Status = Status.WAITING
    slot: int = -1
    shard: int = -1
    home: int = -1
    held: tuple[HeldPages, ...] = ()
    num_covered: int = 0
    digests: list[bytes] = field(default_factory=list)
    max_positions: int = 0
    num_scheduled: int = 0
    num_readable: int = 0
    prefill_len: int = 0
    num_cached: int = 0
    num_iterations: int = 0
    num_preemptions: int = 0
    in_flight: int = 0
    unmasked: bool = False
    last_step: int = 0
    attained: float = 0.0
    family: tuple[Sequence, ...] = ()
    shared_len: int = 0
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt_scores: list[PromptScore | None] = field(default_factory=list)
    scoring: bool = False
    started_slot: bool = False
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.prefill_len = len(self.tokens)
        self.mask = self.request.mask
        self.max_positions = self.request.max_positions
        self.scoring = self.request.params.prompt_logprobs and len(self.tokens) > 1 and self.request.sample == 0
        self.prompt_scores = [None] * len(self.tokens) if self.request.params.prompt_logprobs else []
        self._tables: tuple[PageTable, ...] = ()
        self._tables_end = 0  # pages that they reach to; 0 for tables that must be made anew

    def tables(self, num_pages: int) -> tuple[PageTable, ...]:
        """Its tables up to so many pages, which are kept while nothing changes: most steps of a sequence have the same ones."""
        if self._tables_end != num_pages:
            self._tables = tuple([PageTable(tuple(held.pages[: num_pages - held.first]), held.first) for held in self.held])
            self._tables_end = num_pages
        return self._tables

    def pages_changed(self) -> None:
        """It has other pages than before; those that come after the last need no call."""
        self._tables_end = 0

    @property
    def num_host_pages(self) -> int:
        """Pages in host memory, of the group that has most."""
        return max((len(held.host_pages) for held in self.held), default=0)

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def prefilling(self) -> bool:
        """Part of the prompt has not been scheduled yet."""
        return self.num_scheduled < self.prefill_len

    @property
    def waits_for_first(self) -> bool:
        """Whether the first sample of the request is still to compute the prompt that this one shares with it."""
        if not self.family:
            return False
        first = self.family[0]
        read = first.num_readable >= self.shared_len and not first.scoring  # what the prompt scores, all samples tell
        done = first.num_generated or read or first.status in (Status.FINISHED, Status.HELD)
        return first is not self and not done

    def append(self, sampled: SampledToken, now: float) -> None:
        """Take a token that was sampled, with the log-probabilities that were requested."""
        self.tokens.append(sampled.token)
        if self.request.params.logprobs:
            self.logprobs.append(sampled.logprob)
        if self.request.params.top_logprobs:
            self.top_logprobs.append(sampled.top)
        if self.first_token is None:
            self.first_token = now
        self.last_token = now

    def event(self, sampled: SampledToken | None, text: str, reason: FinishReason | None, error: BaseException | None) -> TokenEvent:
        """The event for the last token, or for an end without one."""
        index = self.num_generated - (sampled is not None)
        return TokenEvent(
            request_id=self.request.id,
            token=None if sampled is None else sampled.token,
            index=index,
            text=text,
            logprob=None if sampled is None else sampled.logprob,
            finish_reason=reason,
            error=error,
            sample=self.request.sample,
            top_logprobs=sampled.top if sampled is not None and self.request.params.top_logprobs else None,
            prompt_scores=None if index else self._scores(),
        )

    def _scores(self) -> tuple[PromptScore | None, ...] | None:
        """Of the prompt, which the first sample of the request computes; None if not requested."""
        return tuple((self.family or (self,))[0].prompt_scores) if self.request.params.prompt_logprobs else None

    def output(self) -> RequestOutput:
        """The answer; only once the sequence has finished."""
        assert self.finish_reason is not None, f"request {self.request.id} has not finished"
        scores = self._scores()
        return RequestOutput(
            id=self.request.id,
            prompt=self.request.prompt,
            tokens=tuple(self.generated),
            text="".join(self.pieces),
            finish_reason=self.finish_reason,
            logprobs=tuple(self.logprobs) if self.request.params.logprobs else None,
            sample=self.request.sample,
            top_logprobs=tuple(self.top_logprobs) if self.request.params.top_logprobs else None,
            prompt_logprobs=None if scores is None else tuple(score and score.logprob for score in scores),
            prompt_top_logprobs=None if scores is None else tuple(score and (score.top_token, score.top_logprob) for score in scores),
            error=self.error,
            times=self.times(),
            num_iterations=self.num_iterations,
            num_cached=self.num_cached,
        )

    def times(self) -> RequestTimes:
        return RequestTimes(self.request.arrival, self.started, self.first_token, self.last_token, self.finished, self.num_generated)


@dataclass(frozen=True)
class RequestTimes:
    """When things happened to a request, in seconds on the engine's clock; None for what never happened.

    Attributes:
        started: its first iteration was scheduled. num_tokens: tokens generated.
    """

    arrival: float
    started: float | None
    first_token: float | None
    last_token: float | None
    finished: float | None
    num_tokens: int

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds from arrival."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def time_per_token(self) -> float | None:
        """Mean time per output token after the first (TPOT), seconds; None for fewer than two tokens."""
        if self.first_token is None or self.last_token is None or self.num_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.num_tokens - 1)

    @property
    def completion_time(self) -> float | None:
        """Seconds from arrival to the end."""
        return None if self.finished is None else self.finished - self.arrival

    @property
    def normalized_latency(self) -> float | None:
        """Completion time per generated token, seconds: the metric of Orca (section 6) and FastServe."""
        return None if self.completion_time is None or not self.num_tokens else self.completion_time / self.num_tokens


@dataclass(frozen=True)
class RequestOutput:
    """The answer to a request, or one of its n samples.

    Attributes:
        tokens: every token that was sampled, the one that ended it included.
        text: the tokens as text, without end-of-sequence and stop tokens and only up to the first stop string; "" without a tokenizer.
        logprobs: of `tokens`, when requested. top_logprobs: per token the most likely ones, most likely first, when requested.
        prompt_logprobs: of `prompt`, None for the first token and where the request ended before; when requested. prompt_top_logprobs: the
            likeliest token in the place of each, with its own, in the same way.
        sample: which of the request's n samples.
        error: what went wrong, when finish_reason is FAILED or the request's own callback raised.
        num_iterations: steps that the request took part in.
        num_cached: tokens of the prompt that were not computed: found in the prefix cache, or shared with another sample.
    """

    id: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    times: RequestTimes
    logprobs: tuple[float, ...] | None = None
    error: BaseException | None = None
    num_iterations: int = 0
    sample: int = 0
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_top_logprobs: tuple[tuple[int, float] | None, ...] | None = None
    num_cached: int = 0

    @property
    def prompt_scores(self) -> tuple[PromptScore | None, ...] | None:
        """`prompt_logprobs` and `prompt_top_logprobs` in one."""
        if self.prompt_logprobs is None or self.prompt_top_logprobs is None:
            return None
        pairs = zip(self.prompt_logprobs, self.prompt_top_logprobs, strict=True)
        return tuple(None if value is None or top is None else PromptScore(value, *top) for value, top in pairs)

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds."""
        return self.times.ttft

    @property
    def time_per_token(self) -> float | None:
        """Mean time per output token after the first, seconds."""
        return self.times.time_per_token
