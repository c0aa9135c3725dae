"""What the engine generates, as the bodies and events of the two endpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from partinf.engine.request import FinishReason, RequestOutput, TokenEvent
from partinf.serve.asked import Asked
from partinf.serve.protocol import (
    CachedTokens,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatText,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
)
from partinf.serve.token_texts import Offsets, TokenTexts, completion_logprobs

_LENGTH = (FinishReason.LENGTH, FinishReason.TIMEOUT)


class Answer(Protocol):
    """Writes the answer to one request."""

    def whole(self, outputs: Sequence[Sequence[RequestOutput]]) -> bytes:
        """The body, from the outputs per prompt."""

    def opening(self) -> Iterator[msgspec.Struct]:
        """The events of a stream that need nothing generated."""

    def event(self, prompt: int, event: TokenEvent) -> msgspec.Struct | None:
        """The event for a token; None where there is nothing to tell yet."""

    def closing(self, outputs: Sequence[Sequence[RequestOutput]]) -> msgspec.Struct:
        """The last event, with the usage and no choices."""


class _Answer:
    """What both have in common: one request, and how many tokens its stream has brought."""

    def __init__(self, asked: Asked, request_id: str, model: str, texts: TokenTexts) -> None:
        self._asked, self._id, self._model, self._texts = asked, request_id, model, texts
        self._created = int(time.time())
        self._generated = 0

    def _usage_so_far(self) -> Usage | UnsetType | None:
        """Of an event that is not the last; how many tokens were cached is known in the end."""
        if not self._asked.usage_so_far:
            return None if self._asked.include_usage else UNSET
        prompt = sum(map(len, self._asked.prompts))
        return Usage(prompt, self._generated, prompt + self._generated)


class CompletionAnswer(_Answer):
    """Of POST /v1/completions."""

    def __init__(self, asked: Asked, request_id: str, model: str, texts: TokenTexts) -> None:
        super().__init__(asked, request_id, model, texts)
        self._offsets: dict[int, Offsets] = {}

    def whole(self, outputs: Sequence[Sequence[RequestOutput]]) -> bytes:
        choices = [self._choice(prompt, output) for prompt, samples in enumerate(outputs) for output in samples]
        return msgspec.json.encode(self._body(choices, usage(self._asked, outputs)))

    def opening(self) -> Iterator[Completion]:
        for prompt, text in enumerate(self._asked.echoed):
            for sample in range(self._asked.params.n):
                reason = "length" if self._asked.only_echo else None
                yield self._event(CompletionChoice(self._index(prompt, sample), text, finish_reason=reason))

    def event(self, prompt: int, event: TokenEvent) -> Completion | None:
        if self._asked.only_echo:
            return None
        self._generated += event.token is not None
        index, logprobs = self._index(prompt, event.sample), None
        if self._asked.params.logprobs:
            start = len(self._asked.echoed[prompt]) if self._asked.echoed else 0
            offsets = self._offsets.setdefault(index, Offsets(self._texts.tokenizer, start))
            logprobs = completion_logprobs(self._texts, offsets, *_sampled(event))
        elif not event.text and event.finish_reason is None:
            return None
        return self._event(CompletionChoice(index, event.text, logprobs, finish_reason(event.finish_reason)))

    def closing(self, outputs: Sequence[Sequence[RequestOutput]]) -> Completion:
        return self._body([], usage(self._asked, outputs))

    def _choice(self, prompt: int, output: RequestOutput) -> CompletionChoice:
        asked = self._asked
        text = (asked.echoed[prompt] if asked.echoed else "") + ("" if asked.only_echo else output.text)
        reason = "length" if asked.only_echo else finish_reason(output.finish_reason)
        logprobs = self._logprobs(prompt, output) if asked.params.logprobs else None
        return CompletionChoice(self._index(prompt, output.sample), text, logprobs, reason)

    def _logprobs(self, prompt: int, output: RequestOutput) -> CompletionLogprobs:
        asked, tokenizer = self._asked, self._texts.tokenizer
        found, start = CompletionLogprobs([], [], [], []), 0
        if asked.echoed:
            given = asked.prompts[prompt]
            values = list(output.prompt_logprobs or [None] * len(given))
            # Of the prompt's tokens the likeliest in each place is known, which is what those who score texts look at.
            tops = [
                None if top is None else (top,) * bool(asked.params.top_logprobs)
                for top in output.prompt_top_logprobs or [None] * len(given)
            ]
            found = completion_logprobs(self._texts, Offsets(tokenizer, continuation=False), given, values, tops)
            start = len(asked.echoed[prompt])
        if not asked.only_echo:
            tokens, values = output.tokens, list(output.logprobs or ())
            new = completion_logprobs(self._texts, Offsets(tokenizer, start), tokens, values, output.top_logprobs or [()] * len(tokens))
            for old, more in zip(_lists(found), _lists(new), strict=True):
                old += more
        return found

    def _index(self, prompt: int, sample: int) -> int:
        return prompt * self._asked.params.n + sample

    def _event(self, choice: CompletionChoice) -> Completion:
        return self._body([choice], self._usage_so_far())

    def _body(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(self._id, "text_completion", self._created, self._model, choices, usage)


class ChatAnswer(_Answer):
    """Of POST /v1/chat/completions."""

    def whole(self, outputs: Sequence[Sequence[RequestOutput]]) -> bytes:
        choices = [
            ChatChoice(
                output.sample,
                message=ChatText("assistant", output.text, None),
                logprobs=self._logprobs(output.tokens, output.logprobs or (), output.top_logprobs or [()] * len(output.tokens)),
                finish_reason=finish_reason(output.finish_reason),
            )
            for output in outputs[0]
        ]
        return msgspec.json.encode(self._body("chat.completion", choices, usage(self._asked, outputs)))

    def opening(self) -> Iterator[ChatCompletion]:
        for sample in range(self._asked.params.n):
            yield self._event(ChatChoice(sample, delta=ChatText("assistant", "")))

    def event(self, prompt: int, event: TokenEvent) -> ChatCompletion | None:
        self._generated += event.token is not None
        logprobs = None
        if self._asked.params.logprobs:
            logprobs = self._logprobs(*_sampled(event))
        elif not event.text and event.finish_reason is None:
            return None
        delta = ChatText(content=event.text) if event.text else ChatText()
        return self._event(ChatChoice(event.sample, delta=delta, logprobs=logprobs, finish_reason=finish_reason(event.finish_reason)))

    def closing(self, outputs: Sequence[Sequence[RequestOutput]]) -> ChatCompletion:
        return self._body("chat.completion.chunk", [], usage(self._asked, outputs))

    def _logprobs(
        self, tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[Sequence[tuple[int, float]]]
    ) -> ChatLogprobs | None:
        return ChatLogprobs(self._texts.chat(tokens, logprobs, tops)) if self._asked.params.logprobs else None

    def _event(self, choice: ChatChoice) -> ChatCompletion:
        return self._body("chat.completion.chunk", [choice], self._usage_so_far())

    def _body(
        self,
        kind: Literal["chat.completion", "chat.completion.chunk"],
        choices: list[ChatChoice],
        usage: Usage | UnsetType | None,
    ) -> ChatCompletion:
        return ChatCompletion(self._id, kind, self._created, self._model, choices, usage)


def usage(asked: Asked, outputs: Sequence[Sequence[RequestOutput]]) -> Usage:
    """Tokens of the prompts, each counted once, and of all samples; cached ones are those that the first sample found."""
    prompt = sum(map(len, asked.prompts))
    cached = sum(output.num_cached for samples in outputs for output in samples if output.sample == 0)
    generated = 0 if asked.only_echo else sum(len(output.tokens) for samples in outputs for output in samples)
    return Usage(prompt, generated, prompt + generated, CachedTokens(cached))


def finish_reason(reason: FinishReason | None) -> str | None:
    """In OpenAI's words; a request whose time was up counts as cut short."""
    if reason is None:
        return None
    return "length" if reason in _LENGTH else reason.value


def _sampled(event: TokenEvent) -> tuple[list[int], list[float], list[Sequence[tuple[int, float]]]]:
    """The token, its log-probability and the alternatives, one of each; nothing for an event without a token."""
    return ([], [], []) if event.token is None else ([event.token], [event.logprob or 0.0], [event.top_logprobs or ()])


def _lists(logprobs: CompletionLogprobs) -> tuple[list, list, list, list]:  # type: ignore[type-arg]
    return logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset
