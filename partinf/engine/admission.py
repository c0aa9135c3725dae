"""The check of a request before it enters the engine: every offence at once, and nothing of the engine touched."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from partinf.engine.detokenize import Tokenizer
from partinf.engine.params import MAX_SEED, is_number, is_unicode, is_whole, shown
from partinf.engine.request import Request, SamplingParams
from partinf.engine.runner import RunnerLimits
from partinf.engine.step import RowSampling
from partinf.foundation.errors import InvalidInput, raise_offences
from partinf.foundation.limits import MAX_ENDS

Prompt = str | Sequence[int]


class RequestCheck:
    """Makes a `Request` of what a user asks for, or says why not."""

    def __init__(self, limits: RunnerLimits, tokenizer: Tokenizer | None, seed: int, eos_ids: Collection[int] = ()) -> None:
        """
        Args:
            eos_ids: tokens that end a text where there is no tokenizer that says so.
        """
        self._limits = limits
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids if tokenizer is None else tokenizer.eos_ids
        self._seed = seed
        if not is_whole(seed, -MAX_SEED, MAX_SEED):
            raise InvalidInput(f"the engine's seed = {shown(seed)}; valid: a whole number from {-MAX_SEED} to {MAX_SEED}")

    def __call__(self, prompt: Prompt, params: SamplingParams, request_id: str, number: int, arrival: float) -> Request:
        """Check, encode and complete a request.

        Raises:
            InvalidInput: an empty prompt, one that fills the context, token ids outside the vocabulary, text or stop strings without a
                tokenizer, text or an id that is no Unicode.
        """
        offences, tokens = self._encode(prompt)
        ends = self._ends(params)
        offences += self._params_offences(params, ends)
        if not is_unicode(request_id):
            offences.append("the id is no Unicode text")
        if not is_number(arrival):
            offences.append(f"arrival = {shown(arrival)}; valid: seconds on the engine's clock")
        name = request_id if is_unicode(request_id) else shown(request_id)
        raise_offences(f"request {name}: {offence}" for offence in offences)
        return Request(
            id=request_id,
            number=number,
            prompt=tuple(tokens),
            params=params,
            max_tokens=min(params.max_tokens, self._limits.max_context - len(tokens)),
            sampling=RowSampling(
                temperature=float(params.temperature),
                top_k=params.top_k if params.top_k < self._limits.vocab_size else 0,
                top_p=float(params.top_p),
                min_p=float(params.min_p),
                seed=derived_seed(self._seed, request_id) if params.seed is None else params.seed,
                presence=float(params.presence_penalty),
                frequency=float(params.frequency_penalty),
                repetition=float(params.repetition_penalty),
                top_logprobs=min(params.top_logprobs, self._limits.vocab_size),
                adjusted=_adjusted(params, ends),
                ends_from=len(tokens) + params.min_tokens if params.min_tokens else 0,
            ),
            arrival=arrival,
            ends=ends,
            mask=None if params.constraint is None else params.constraint.first_mask,
        )

    def _encode(self, prompt: Prompt) -> tuple[list[str], list[int]]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                return ["the prompt is text, but the engine has no tokenizer; give token ids"], []
            if not is_unicode(prompt):
                return ["the prompt holds half of a surrogate pair, which is no Unicode text"], []
            try:
                tokens = list(self._tokenizer.encode(prompt, limit=self._limits.max_prompt_len)) if prompt else []
            except InvalidInput as error:
                return [f"the prompt: {offence}" for offence in error.offences], []
        elif isinstance(prompt, Iterable):
            tokens = (
                list(prompt)
                if isinstance(prompt, list | tuple) and set(map(type, prompt)) <= {int}
                else [_plain(token) for token in prompt]
            )
        else:
            return [f"the prompt is of type {type(prompt).__name__}; give text or a list of token ids"], []
        return self._token_offences("prompt", tokens) + self._length_offences(tokens), tokens

    def _length_offences(self, tokens: list[int]) -> list[str]:
        context, longest = self._limits.max_context, self._limits.max_prompt_len
        if not tokens:
            return ["the prompt is empty; at least one token is needed"]
        if len(tokens) <= longest:
            return []
        why = "leaves one token to generate" if longest == context - 1 else "fits one step"
        return [f"the prompt has {len(tokens)} tokens, the context {context}; the longest prompt is {longest}, which {why}"]

    def _ends(self, params: SamplingParams) -> tuple[int, ...]:
        """Token ids that end a text."""
        if not isinstance(params, SamplingParams):
            return ()
        eos = () if params.ignore_eos else self._eos_ids
        return tuple(sorted({*params.stop_token_ids, *eos}))

    def _params_offences(self, params: SamplingParams, ends: tuple[int, ...]) -> list[str]:
        if not isinstance(params, SamplingParams):
            return [f"params is of type {type(params).__name__}; give SamplingParams"]
        offences = self._token_offences("stop_token_ids", list(params.stop_token_ids))
        offences += self._token_offences("logit_bias", [token for token, _ in params.logit_bias])
        if params.temperature and not self._limits.random:
            offences.append(
                f"temperature = {params.temperature}, but the steps take the most likely token; plan with Capacity(random=True)"
            )
        if params.min_tokens and len(ends) > (most := min(MAX_ENDS, self._limits.vocab_size - 1)):
            offences.append(f"min_tokens = {params.min_tokens} with {len(ends)} tokens that end the text; at most {most} can be held back")
        if not self._limits.extended:
            offences += [
                f"{name} = {shown(getattr(params, name))}, but the steps cannot do that; plan with Capacity(extended=True)"
                for name, off in _RICH.items()
                if getattr(params, name) != off and (name != "min_tokens" or ends)
            ]
        if params.constraint is not None and not self._limits.constrained:
            offences.append("constraint is given, but the steps take any token; plan with Capacity(constrained=True)")
        if params.constraint is not None and params.min_tokens:
            offences.append(
                f"min_tokens = {params.min_tokens}, but an answer that is held to a grammar ends where that does; leave one out"
            )
        if params.stop and self._tokenizer is None:
            offences.append("stop strings need a tokenizer, and the engine has none; use stop_token_ids")
        return offences

    def _token_offences(self, name: str, tokens: list[Any]) -> list[str]:
        vocab = self._limits.vocab_size
        if set(map(type, tokens)) <= {int} and (not tokens or (min(tokens) >= 0 and max(tokens) < vocab)):
            return []
        bad = [token for token in tokens if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab]
        if not bad:
            return []
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        return [f"{name} holds {shown(bad[0])}{more}, which is no token id; valid: 0..{vocab - 1}"]


# Parameters of extended sampling, and their values when off.
_STEERING: dict[str, Any] = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "logit_bias": ()}
_RICH: dict[str, Any] = _STEERING | {"min_tokens": 0, "top_logprobs": 0, "prompt_logprobs": False}


def _adjusted(params: SamplingParams, ends: tuple[int, ...]) -> bool:
    return bool(params.min_tokens and ends) or any(getattr(params, name) != off for name, off in _STEERING.items())


def _plain(token: Any) -> Any:
    """A number of another library as an int; anything else as it is."""
    return token.__index__() if hasattr(token, "__index__") and not isinstance(token, bool) else token


def derived_seed(seed: int, request_id: str) -> int:
    """The seed of a request that names none, from the engine's seed and the request's id; below 2³²."""
    digest = hashlib.blake2b(f"{seed}/{request_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
