"""Requests on their way in: checked, numbered, split into samples, and refused where too many wait."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from partinf.engine.admission import Prompt, RequestCheck
from partinf.engine.detokenize import TextReader, Tokenizer
from partinf.engine.live import Live, OnToken
from partinf.engine.request import Request, SamplingParams, Sequence
from partinf.engine.runner import RunnerLimits
from partinf.foundation.errors import InvalidInput, Overloaded, raise_offences

_REMEMBERED = 64  # starts from which the speed of the queue is estimated
_UNKNOWN_WAIT = 1.0  # seconds, before anything has started


class Intake:
    """Makes requests of what users ask for, and of these what the engine keeps."""

    def __init__(
        self, limits: RunnerLimits, tokenizer: Tokenizer | None, seed: int, clock: Callable[[], float], eos_ids: Collection[int] = ()
    ) -> None:
        self._check = RequestCheck(limits, tokenizer, seed, eos_ids)
        self._limits = limits
        self._tokenizer = tokenizer
        self._clock = clock
        self._numbers = itertools.count()
        self._names = itertools.count()

    def request(
        self, prompt: Prompt, params: SamplingParams | None, request_id: str | None, taken: Collection[str], arrival: float | None = None
    ) -> Request:
        """Check a request.

        Args:
            request_id: made up if None, and then none of `taken`. arrival: now if None.
        """
        number = next(self._names)
        while request_id is None and f"request-{number}" in taken:
            number = next(self._names)
        name = f"request-{number}" if request_id is None else request_id
        when = self._clock() if arrival is None else arrival
        return self._check(prompt, SamplingParams() if params is None else params, name, number, when)

    def requests(
        self, prompts: SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None, taken: Collection[str]
    ) -> list[Request]:
        """Check many requests.

        Raises:
            InvalidInput: what is wrong with any of them.
        """
        if isinstance(prompts, str):
            raise InvalidInput("prompts is one text; give a list of prompts")
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InvalidInput(f"{len(each)} params for {len(prompts)} prompts; give one for all, or one each")
        requests, offences = [], list[str]()
        for prompt, one in zip(prompts, each, strict=True):
            try:
                requests.append(self.request(prompt, one, None, taken))
            except InvalidInput as error:
                offences += error.offences
        raise_offences(offences)
        return requests

    def samples(self, request: Request, on_token: OnToken | None, reported: bool) -> list[Live]:
        """The samples of a request, numbered in order; those after the first share the pages of its prompt."""
        params = request.params
        ends = frozenset(request.ends)
        sequences = [Sequence(self._sample(request, index)) for index in range(params.n)]
        if params.n > 1:
            size = self._limits.page_size if self._limits.chunks else self._limits.max_len + 1
            for sequence in sequences:
                sequence.family = tuple(sequences)
                sequence.shared_len = (len(request.prompt) - 1) // size * size
        full_len = len(request.prompt) + request.max_tokens
        grammar, lives = params.constraint, []
        for sequence in sequences:
            constraint = None if grammar is None else grammar.start()
            lives.append(Live(sequence, self._reader(params), ends, full_len, on_token, reported, constraint))
        return lives

    def _sample(self, request: Request, index: int) -> Request:
        return replace(request, number=next(self._numbers), sample=index, sampling=replace(request.sampling, sample_index=index))

    def _reader(self, params: SamplingParams) -> TextReader | None:
        if self._tokenizer is None:
            return None
        named = {} if params.skip_special_tokens else {"special": True}
        return TextReader(self._tokenizer.stream(continuation=True, **named), params.stop)


class WaitingBound:
    """How many requests, and how many tokens of their prompts, may wait for their first iteration.

    A request that finds the queue empty is never refused, so that no bound is too small for any request.
    """

    def __init__(self, max_requests: int | None, max_tokens: int | None) -> None:
        """
        Args:
            max_requests, max_tokens: None for no bound.

        Raises:
            InvalidInput: bounds below 1.
        """
        given = (("max_waiting", max_requests), ("max_waiting_tokens", max_tokens))
        raise_offences(f"{name} = {bound}; it must be at least 1, or None" for name, bound in given if bound is not None and bound < 1)
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._waiting: dict[str, int] = {}  # tokens by request, in order of arrival
        self._num_tokens = 0
        self._started: deque[float] = deque(maxlen=_REMEMBERED)

    def check(self, num_tokens: int, now: float) -> None:
        """Raise `Overloaded` if a prompt of so many tokens may not join those that wait."""
        requests = self._too_many(len(self._waiting) + 1, self._max_requests)
        tokens = self._too_many(self._num_tokens + num_tokens, self._max_tokens)
        if not self._waiting or not (requests or tokens):
            return
        leaving = requests
        for count, held in enumerate(self._waiting.values(), start=1):
            tokens -= held
            if tokens <= 0:
                leaving = max(leaving, count)
                break
        else:
            leaving = len(self._waiting)
        what = f"{len(self._waiting)} requests with {self._num_tokens} prompt tokens wait"
        bounds = f"max_waiting = {self._max_requests}, max_waiting_tokens = {self._max_tokens}"
        raise Overloaded(f"overloaded: {what} ({bounds}); try again later", self._seconds(leaving, now))

    def enter(self, request_id: str, num_tokens: int) -> None:
        self._waiting[request_id] = num_tokens
        self._num_tokens += num_tokens

    def leave(self, request_id: str, started: float | None) -> None:
        """A request waits no longer: it started then, or ended (None). Without effect for one that does not wait."""
        tokens = self._waiting.pop(request_id, None)
        if tokens is not None:
            self._num_tokens -= tokens
            if started is not None:
                self._started.append(started)

    def _seconds(self, count: int, now: float) -> float:
        """Time until so many have started, at the pace of the last ones."""
        if not self._started or now <= self._started[0]:
            return _UNKNOWN_WAIT
        return count * (now - self._started[0]) / len(self._started)

    @staticmethod
    def _too_many(count: int, bound: int | None) -> int:
        return 0 if bound is None else max(0, count - bound)
