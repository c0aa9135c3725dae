"""What the engine generates, as the bodies and events of the two endpoints."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from partinf.engine.request import FinishReason, RequestOutput, TokenEvent
from partinf.engine.step import PromptScore
from partinf.serve.parsed_request import ParsedRequest
from partinf.serve.protocol import (
    CachedTokens,
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatText,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    ToolCall,
    Usage,
)
from partinf.serve.replies import ReplyReader
from partinf.serve.token_texts import Offsets, TokenTexts, completion_logprobs, prompt_logprobs
from partinf.serve.tool_calls import CallPart

_NOTHING = ChatText()
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

    def __init__(self, parsed: ParsedRequest, request_id: str, model: str, texts: TokenTexts) -> None:
        self._request, self._id, self._model, self._texts = parsed, request_id, model, texts
        self._created = int(time.time())
        self._generated = 0

    def _usage_so_far(self) -> Usage | UnsetType | None:
        """Of an event that is not the last; how many tokens were cached is known in the end."""
        if not self._request.usage_so_far:
            return None if self._request.include_usage else UNSET
        prompt = sum(map(len, self._request.prompts))
        return Usage(prompt, self._generated, prompt + self._generated)


class CompletionAnswer(_Answer):
    """Of POST /v1/completions."""

    def __init__(self, parsed: ParsedRequest, request_id: str, model: str, texts: TokenTexts) -> None:
        super().__init__(parsed, request_id, model, texts)
        self._offsets: dict[int, Offsets] = {}

    def whole(self, outputs: Sequence[Sequence[RequestOutput]]) -> bytes:
        best = [self._request.best(samples) for samples in outputs]
        choices = [self._choice(prompt, place, output) for prompt, samples in enumerate(best) for place, output in enumerate(samples)]
        return msgspec.json.encode(self._body(choices, usage(self._request, outputs)))

    def opening(self) -> Iterator[Completion]:
        for prompt, text in enumerate(() if self._request.scored else self._request.echoed):
            for sample in range(self._request.params.n):
                reason = "length" if self._request.only_echo else None
                yield self._event(CompletionChoice(self._index(prompt, sample), text, finish_reason=reason))

    def event(self, prompt: int, event: TokenEvent) -> Completion | None:
        if self._request.only_echo:
            return self._event(self._echo(prompt, event)) if self._request.scored and not event.index else None
        self._generated += event.token is not None
        index, logprobs = self._index(prompt, event.sample), None
        if self._request.logprobs:
            start = len(self._request.echoed[prompt]) if self._request.echoed else 0
            offsets = self._offsets.setdefault(index, self._offsets_from(start))
            logprobs = completion_logprobs(self._texts, offsets, *_sampled(event))
        elif not event.text and event.finish_reason is None:
            return None
        choice = CompletionChoice(index, event.text, logprobs, finish_reason(event.finish_reason))
        return self._event(self._echo(prompt, event, choice) if self._request.scored and not event.index else choice)

    def _echo(self, prompt: int, event: TokenEvent, then: CompletionChoice | None = None) -> CompletionChoice:
        """The prompt with its log-probabilities, which are there with the first token, and what comes with that token."""
        logprobs = self._scored(prompt, event.prompt_scores)
        text = self._request.echoed[prompt]
        if then is None or then.logprobs is None:
            return CompletionChoice(self._index(prompt, event.sample), text, logprobs, "length")
        _extend(logprobs, then.logprobs)
        return CompletionChoice(then.index, text + then.text, logprobs, then.finish_reason)

    def closing(self, outputs: Sequence[Sequence[RequestOutput]]) -> Completion:
        return self._body([], usage(self._request, outputs))

    def _choice(self, prompt: int, place: int, output: RequestOutput) -> CompletionChoice:
        parsed = self._request
        text = (parsed.echoed[prompt] if parsed.echoed else "") + ("" if parsed.only_echo else output.text)
        reason = "length" if parsed.only_echo else finish_reason(output.finish_reason)
        logprobs = self._logprobs(prompt, output) if parsed.logprobs else None
        choice = CompletionChoice(self._index(prompt, place), text, logprobs, reason)
        if parsed.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(self._texts, output.prompt, output.prompt_scores or (), parsed.prompt_logprobs)
        return choice

    def _logprobs(self, prompt: int, output: RequestOutput) -> CompletionLogprobs:
        parsed = self._request
        found, start = CompletionLogprobs([], [], [], []), 0
        if parsed.echoed:
            found, start = self._scored(prompt, output.prompt_scores), len(parsed.echoed[prompt])
        if not parsed.only_echo:
            tokens, values = output.tokens, list(output.logprobs or ())
            new = completion_logprobs(self._texts, self._offsets_from(start), tokens, values, output.top_logprobs or [()] * len(tokens))
            _extend(found, new)
        return found

    def _scored(self, prompt: int, scores: Sequence[PromptScore | None] | None) -> CompletionLogprobs:
        """Of the prompt's tokens. The likeliest in each place is known, which is what clients that score texts look at."""
        given, wanted = self._request.prompts[prompt], bool(self._request.params.top_logprobs)
        scores = scores or [None] * len(given)
        values = [score and score.logprob for score in scores]
        tops = [None if score is None else ((score.top_token, score.top_logprob),) * wanted for score in scores]
        offsets = Offsets(self._texts.tokenizer, continuation=False, special=not self._request.params.skip_special_tokens)
        return completion_logprobs(self._texts, offsets, given, values, tops)

    def _offsets_from(self, start: int) -> Offsets:
        return Offsets(self._texts.tokenizer, start, special=not self._request.params.skip_special_tokens)

    def _index(self, prompt: int, sample: int) -> int:
        return prompt * self._request.num_choices + sample

    def _event(self, choice: CompletionChoice) -> Completion:
        return self._body([choice], self._usage_so_far())

    def _body(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(self._id, "text_completion", self._created, self._model, choices, usage)


class ChatAnswer(_Answer):
    """Of POST /v1/chat/completions."""

    def __init__(self, parsed: ParsedRequest, request_id: str, model: str, texts: TokenTexts) -> None:
        super().__init__(parsed, request_id, model, texts)
        self._readers: dict[int, ReplyReader] = {}

    def whole(self, outputs: Sequence[Sequence[RequestOutput]]) -> bytes:
        choices = [
            ChatChoice(
                output.sample,
                message=self._message(output),
                logprobs=self._logprobs(output.tokens, output.logprobs or (), output.top_logprobs or [()] * len(output.tokens)),
                finish_reason=self._reason(output.sample, output.finish_reason),
            )
            for output in outputs[0]
        ]
        body, parsed = self._body("chat.completion", choices, usage(self._request, outputs)), self._request
        if parsed.prompt_logprobs is not None:
            first = outputs[0][0]
            body.prompt_logprobs = prompt_logprobs(self._texts, first.prompt, first.prompt_scores or (), parsed.prompt_logprobs)
        return msgspec.json.encode(body)

    def opening(self) -> Iterator[ChatCompletion]:
        for sample in range(self._request.params.n):
            yield self._event(ChatChoice(sample, delta=ChatText("assistant", "")))

    def event(self, prompt: int, event: TokenEvent) -> ChatCompletion | None:
        self._generated += event.token is not None
        logprobs = None
        if self._request.logprobs:
            logprobs = self._logprobs(*_sampled(event))
        elif not event.text and event.finish_reason is None:
            return None
        delta = ChatText(content=event.text) if event.text else ChatText()
        if self._request.reader is not None:
            delta = self._delta(event.sample, event.text, event.finish_reason is not None)
            if delta == _NOTHING and logprobs is None and event.finish_reason is None:
                return None
        return self._event(
            ChatChoice(event.sample, delta=delta, logprobs=logprobs, finish_reason=self._reason(event.sample, event.finish_reason))
        )

    def _reason(self, sample: int, reason: FinishReason | None) -> str | None:
        """Why an answer ended: one that calls tools waits for what they say."""
        calls = sample in self._readers and self._readers[sample].num_calls
        return "tool_calls" if calls and reason is FinishReason.STOP else finish_reason(reason)

    def _message(self, output: RequestOutput) -> ChatText:
        if self._request.reader is None:
            return ChatText("assistant", output.text, None)
        reader = self._readers[output.sample] = self._request.reader()
        part = reader.push(output.text)
        reader.finish(part)
        message = ChatText("assistant", part.content or (None if part.calls else ""), None)
        if part.reasoning:
            message.reasoning_content = part.reasoning
        calls: dict[int, ToolCall] = {}
        for piece in part.calls:
            call = calls.setdefault(
                piece.index, ToolCall(CalledFunction(piece.name or UNSET, ""), id=new_call_id(self._request.call_id_len), type="function")
            )
            call.function.arguments = f"{call.function.arguments}{piece.arguments}"
        if calls:
            message.tool_calls = list(calls.values())
        return message

    def _delta(self, sample: int, text: str, last: bool) -> ChatText:
        """What more text of an answer adds to its message."""
        assert self._request.reader is not None
        reader = self._readers.get(sample)
        if reader is None:
            reader = self._readers[sample] = self._request.reader()
        part = reader.push(text)
        if last:
            reader.finish(part)
        delta = ChatText()
        if part.content:
            delta.content = part.content
        if part.reasoning:
            delta.reasoning_content = part.reasoning
        if part.calls:
            delta.tool_calls = list(map(self._call_delta, part.calls))
        return delta

    def _call_delta(self, piece: CallPart) -> ToolCall:
        if piece.name is None:
            return ToolCall(CalledFunction(arguments=piece.arguments), piece.index)
        return ToolCall(CalledFunction(piece.name, piece.arguments), piece.index, new_call_id(self._request.call_id_len), "function")

    def closing(self, outputs: Sequence[Sequence[RequestOutput]]) -> ChatCompletion:
        return self._body("chat.completion.chunk", [], usage(self._request, outputs))

    def _logprobs(
        self, tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[Sequence[tuple[int, float]]]
    ) -> ChatLogprobs | None:
        return ChatLogprobs(self._texts.chat(tokens, logprobs, tops)) if self._request.logprobs else None

    def _event(self, choice: ChatChoice) -> ChatCompletion:
        return self._body("chat.completion.chunk", [choice], self._usage_so_far())

    def _body(
        self,
        kind: Literal["chat.completion", "chat.completion.chunk"],
        choices: list[ChatChoice],
        usage: Usage | UnsetType | None,
    ) -> ChatCompletion:
        return ChatCompletion(self._id, kind, self._created, self._model, choices, usage)


def usage(parsed: ParsedRequest, outputs: Sequence[Sequence[RequestOutput]]) -> Usage:
    """Tokens of the prompts, each counted once, and of all samples; cached ones are those that the first sample found."""
    prompt = sum(map(len, parsed.prompts))
    cached = sum(output.num_cached for samples in outputs for output in samples if output.sample == 0)
    generated = 0 if parsed.only_echo else sum(len(output.tokens) for samples in outputs for output in samples)
    return Usage(prompt, generated, prompt + generated, CachedTokens(cached))


def new_call_id(length: int) -> str:
    """A name for a call, as templates of the model take it back."""
    name = uuid.uuid4().hex
    return name[:length] if length < len(name) - len("call_") else f"call_{name[: length - len('call_')]}"


def finish_reason(reason: FinishReason | None) -> str | None:
    """In OpenAI's words; a request whose time was up counts as cut short."""
    if reason is None:
        return None
    return "length" if reason in _LENGTH else reason.value


def _sampled(event: TokenEvent) -> tuple[list[int], list[float], list[Sequence[tuple[int, float]]]]:
    """The token, its log-probability and the alternatives, one of each; nothing for an event without a token."""
    return ([], [], []) if event.token is None else ([event.token], [event.logprob or 0.0], [event.top_logprobs or ()])


def _extend(logprobs: CompletionLogprobs, more: CompletionLogprobs) -> None:
    logprobs.tokens += more.tokens
    logprobs.token_logprobs += more.token_logprobs
    logprobs.top_logprobs += more.top_logprobs
    logprobs.text_offset += more.text_offset
