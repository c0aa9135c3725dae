"""From a request's body to what the engine is asked: prompts as tokens and one `SamplingParams`; every offence at once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from partinf.engine.params import MAX_SEED, SamplingParams
from partinf.errors import InvalidInput
from partinf.serve.errors import Offence, invalid, raise_invalid, unknown_model
from partinf.serve.prompts import Served, as_text, encoded, given_prompts, length_offence, rendered
from partinf.serve.protocol import ChatBody, CompletionBody, SamplingBody

_NAME = re.compile(r"\w+")


@dataclass(frozen=True)
class Asked:
    """A request that has been read and checked, as far as that needs no engine.

    Attributes:
        prompts: token ids. echoed: per prompt the text to repeat, empty without `echo`.
        only_echo: nothing is to be generated; the engine generates a token all the same, which is dropped.
    """

    prompts: list[list[int]]
    params: SamplingParams
    stream: bool
    include_usage: bool
    echoed: list[str]
    only_echo: bool


def ask_completion(body: CompletionBody, served: Served, offences: list[Offence]) -> Asked:
    """Of POST /v1/completions.

    Args:
        offences: what was found already.

    Raises:
        ApiError: 404 for another model; 400 with all offences.
    """
    _check_model(body.model, served)
    offences = offences + _stream_offences(body)
    if body.best_of not in (None, body.n):
        offences.append(Offence(f"best_of = {body.best_of} is not supported; leave it out, or give n, which is {body.n}", "best_of"))
    if body.max_tokens == 0 and not body.echo:
        offences.append(Offence("max_tokens = 0 makes sense with echo only; at least 1 is needed without it", "max_tokens"))
    if body.echo and body.stream and body.logprobs is not None:
        offences.append(Offence("echo with logprobs is not streamed; leave one of the three out", "echo"))
    given = given_prompts(body, served, offences)
    prompts = [encoded(prompt, f"prompt[{place}]" if len(given) > 1 else "prompt", served, offences) for place, prompt in enumerate(given)]
    params = _params(
        body,
        offences,
        {},
        max_tokens=max(1, body.max_tokens),
        logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs or 0,
        prompt_logprobs=body.echo and body.logprobs is not None,
    )
    if len(prompts) * body.n > served.max_choices:
        offences.append(Offence(f"{len(prompts)} prompts × n = {body.n} are too many; at most {served.max_choices} choices", "n"))
    names = {"prompt": "prompt", "max_tokens": "max_tokens"}
    params = _checked(prompts, params, max(1, body.max_tokens), names, served, offences)
    echoed = [as_text(prompt, served) for prompt in given] if body.echo else []
    only_echo = body.max_tokens == 0
    return Asked(prompts, params, body.stream, _wants_usage(body), echoed, only_echo)


def ask_chat(body: ChatBody, served: Served, offences: list[Offence]) -> Asked:
    """Of POST /v1/chat/completions; as `ask_completion`."""
    _check_model(body.model, served)
    offences = offences + _stream_offences(body)
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    if body.max_tokens not in (None, limit):
        offences.append(Offence(f"max_tokens = {body.max_tokens} and max_completion_tokens = {limit} differ; give one", "max_tokens"))
    if body.top_logprobs and not body.logprobs:
        offences.append(Offence("top_logprobs needs logprobs to be true", "top_logprobs"))
    if body.n > served.max_choices:
        offences.append(Offence(f"n = {body.n} is too many; at most {served.max_choices} choices", "n"))
    prompt = rendered(body, served, offences)
    params = _params(
        body,
        offences,
        {"max_tokens": name},
        max_tokens=limit or served.limits.max_context,
        logprobs=body.logprobs,
        top_logprobs=body.top_logprobs,
    )
    prompts = [] if prompt is None else [prompt]
    params = _checked(prompts, params, limit or 1, {"prompt": "messages", "max_tokens": name}, served, offences)
    return Asked(prompts, params, body.stream, _wants_usage(body), [], False)


def _check_model(name: str, served: Served) -> None:
    if name not in served.names:
        raise unknown_model(name, served.names)


def _stream_offences(body: SamplingBody) -> list[Offence]:
    offences = []
    if body.stream_options is not None and not body.stream:
        offences.append(Offence("stream_options needs stream to be true", "stream_options"))
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        offences.append(Offence("include_obfuscation is not supported", "stream_options.include_obfuscation"))
    return offences


def _wants_usage(body: SamplingBody) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _params(body: SamplingBody, offences: list[Offence], names: dict[str, str], **more: Any) -> SamplingParams | None:
    """The engine's parameters; what is wrong with them joins the offences."""
    try:
        return SamplingParams(
            temperature=body.temperature,
            top_k=max(0, body.top_k),
            top_p=body.top_p,
            min_p=body.min_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=tuple(body.logit_bias.items()),
            n=body.n,
            seed=_seed(body.seed),
            stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            priority=body.priority,
            **more,
        )
    except InvalidInput as error:
        offences += [_named(offence, names, None) for offence in error.offences]
        return None


def _checked(
    prompts: list[list[int]],
    params: SamplingParams | None,
    max_tokens: int,
    names: dict[str, str],
    served: Served,
    offences: list[Offence],
) -> SamplingParams:
    """What the engine would say, and whether there is room for what is asked.

    Args:
        params: None where they are wrong; the prompts are checked all the same.
        names: how the body calls `prompt` and `max_tokens`.

    Raises:
        ApiError: all offences. Those of length have a code of their own with OpenAI, so they are told apart when nothing else is wrong.
    """
    lengths: list[Offence] = []
    for place, prompt in enumerate(prompts):
        where = names["prompt"] + (f"[{place}]" if len(prompts) > 1 else "")
        if (offence := length_offence(prompt, where, max_tokens, names["max_tokens"], served.limits)) is not None:
            lengths.append(offence)
        elif not any((known.param or "").startswith(where) for known in offences):
            try:
                served.check(prompt, params or SamplingParams(), "", 0, 0.0)
            except InvalidInput as error:
                offences += [_named(message.partition(": ")[2], names, where) for message in error.offences]
    if lengths and not offences:
        raise invalid(lengths, code="context_length_exceeded")
    raise_invalid(offences + lengths)
    assert params is not None
    return params


def _seed(seed: int | None) -> int | None:
    """A seed of 64 bits as one of 32."""
    if seed is None or 0 <= seed <= MAX_SEED:
        return seed
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")


def _named(message: str, names: dict[str, str], prompt: str | None) -> Offence:
    """The engine's offences begin with the parameter (`top_p = 3; valid: …`) or speak of the prompt."""
    match = _NAME.match(message)
    name = "" if match is None else match.group()
    if name == "prompt" or message.startswith("the prompt"):
        return Offence(message, prompt)
    if name not in SamplingParams.__dataclass_fields__:
        return Offence(message, None)
    return Offence(names.get(name, name) + message[len(name) :], names.get(name, name))


AskFunction = Callable[[Any, Served, list[Offence]], Asked]
