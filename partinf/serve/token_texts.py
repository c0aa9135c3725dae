"""Log-probabilities as OpenAI writes them, for both endpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from partinf.checkpoint.tokenizer import Tokenizer
from partinf.engine.step import PromptScore
from partinf.serve.protocol import CompletionLogprobs, PromptLogprob, PromptLogprobs, TokenLogprob, TokenLogprobs

_LOWEST = -9999.0  # JSON knows no infinity; OpenAI's servers write this

Top = Sequence[tuple[int, float]]


class TokenTexts:
    """Names tokens for readers; without a tokenizer, by their ids."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = str(token) if self.tokenizer is None else self.tokenizer.token_text(token)
            self._texts[token] = text
        return text

    def bytes(self, token: int) -> list[int] | None:
        return None if self.tokenizer is None else list(self.tokenizer.token_bytes(token))

    def chat(self, tokens: Iterable[int], logprobs: Iterable[float], tops: Iterable[Top]) -> list[TokenLogprobs]:
        """One entry per token."""
        return [
            TokenLogprobs(
                self.text(token),
                _finite(logprob),
                self.bytes(token),
                [TokenLogprob(self.text(other), _finite(value), self.bytes(other)) for other, value in top],
            )
            for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
        ]


class Offsets:
    """Where each token of one choice begins in its text, in characters; one that only completes a character begins where that does.

    Bytes that turn out to be no character are replaced in the text when the next token shows it; they stay the earlier token's.
    """

    def __init__(self, tokenizer: Tokenizer | None, start: int = 0, continuation: bool = True, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stream = None if tokenizer is None else tokenizer.stream(continuation=continuation, special=special)
        self._next = start

    def push(self, token: int) -> int:
        if self._tokenizer is None or self._stream is None:
            return self._next
        text, start = self._stream.push(token), self._next
        self._next += len(text)
        if "\ufffd" in text:
            start += max(0, len(text) - len(self._tokenizer.stream(continuation=True).push(token)))
        return start


def completion_logprobs(
    texts: TokenTexts,
    offsets: Offsets,
    tokens: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[Top | None],
) -> CompletionLogprobs:
    """The lists of /v1/completions. A token is among its own alternatives, as OpenAI has it; None stands where nothing is known."""
    alternatives: list[dict[str, float] | None] = []
    for token, logprob, top in zip(tokens, logprobs, tops, strict=True):
        if top is None or logprob is None:
            alternatives.append(None)
        else:
            alternatives.append({texts.text(other): _finite(value) for other, value in top} | {texts.text(token): _finite(logprob)})
    return CompletionLogprobs(
        tokens=[texts.text(token) for token in tokens],
        token_logprobs=[None if logprob is None else _finite(logprob) for logprob in logprobs],
        top_logprobs=alternatives,
        text_offset=[offsets.push(token) for token in tokens],
    )


def prompt_logprobs(texts: TokenTexts, prompt: Sequence[int], scores: Sequence[PromptScore | None], count: int) -> PromptLogprobs:
    """vLLM's list: each token of the prompt, and, where `count` is 1, the likeliest in its place."""
    found: PromptLogprobs = []
    for token, score in zip(prompt, scores, strict=False):
        if score is None:
            found.append(None)
            continue
        entries = {token: PromptLogprob(_finite(score.logprob), 1 if score.top_token == token else None, texts.text(token))}
        if count:
            entries[score.top_token] = PromptLogprob(_finite(score.top_logprob), 1, texts.text(score.top_token))
        found.append({str(name): entry for name, entry in entries.items()})
    return found


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
