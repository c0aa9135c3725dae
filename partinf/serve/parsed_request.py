"""From a request's body to the engine's input: prompts as tokens and one `SamplingParams`; every offence at once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from partinf.engine.constraint import Grammar
from partinf.engine.params import MAX_SEED, SamplingParams
from partinf.engine.request import RequestOutput
from partinf.foundation.errors import InvalidInput
from partinf.serve.conversations import Conversation
from partinf.serve.errors import Offence, invalid, raise_invalid, unknown_model
from partinf.serve.prompts import Served, as_text, encoded, given_prompts, kept_tokens, length_offence
from partinf.serve.protocol import ChatBody, CompletionBody, SamplingBody
from partinf.serve.replies import ReplyReader

T = TypeVar("T")

_NAME = re.compile(r"\w+")


@dataclass(frozen=True)
class ParsedRequest:
    """A request that has been read and checked, as far as that needs no engine.

    Attributes:
        prompts: token ids. echoed: per prompt the text to repeat, empty without `echo`.
        num_choices: of each prompt; where more are sampled, the likeliest. logprobs: whether answers tell those of tokens.
        reader: makes what reads an answer, where that is more than text. call_id_len: characters of the ids of calls.
        prompt_logprobs: how many of the most likely tokens are listed for each position of the prompt; None for no list.
        include_usage: a stream ends with the usage. usage_so_far: and each of its events has what there has been.
        only_echo: nothing is to be generated; the engine generates a token all the same, which is dropped.
    """

    prompts: list[list[int]]
    params: SamplingParams
    stream: bool
    include_usage: bool
    usage_so_far: bool
    echoed: list[str]
    only_echo: bool
    num_choices: int
    logprobs: bool = False
    prompt_logprobs: int | None = None
    reader: Callable[[], ReplyReader] | None = None
    call_id_len: int = 29

    @property
    def scored(self) -> bool:
        """Whether prompts are repeated with their log-probabilities."""
        return self.logprobs and bool(self.echoed)

    def best(self, samples: Sequence[RequestOutput]) -> Sequence[RequestOutput]:
        """The samples of a prompt that are answered: those whose tokens are the likeliest on average, if more were made."""
        if len(samples) == self.num_choices:
            return samples
        return sorted(samples, key=_mean_logprob, reverse=True)[: self.num_choices]


def _mean_logprob(output: RequestOutput) -> float:
    return sum(output.logprobs or ()) / max(1, len(output.tokens))


def parse_completion(
    body: CompletionBody, served: Served, offences: list[Offence], text: str | None = None, constraint: Grammar | None = None
) -> ParsedRequest:
    """Of POST /v1/completions.

    Args:
        offences: what was found already. constraint: what the answer is held to.

    Raises:
        ApiError: 404 for another model; 400 with all offences.
    """
    check_model(body.model, served)
    offences = offences + _offences(body, body.max_tokens)
    samples = body.n if body.best_of is None else body.best_of
    if samples < body.n:
        offences.append(Offence(f"best_of = {samples} is less than n, which is {body.n}", "best_of"))
    if samples > body.n and body.stream:
        offences.append(Offence("best_of beyond n is not streamed: which are the best is known in the end", "best_of"))
    if body.max_tokens == 0 and not body.echo:
        offences.append(Offence("max_tokens = 0 makes sense with echo only; at least 1 is needed without it", "max_tokens"))
    given, lengths = given_prompts(body, served, offences), list[Offence]()
    names = [f"prompt[{place}]" if len(given) > 1 else "prompt" for place in range(len(given))]
    kept = kept_tokens(body.truncate_prompt_tokens, body.max_tokens, served.limits)
    prompts = [
        encoded(prompt, name, served, offences, lengths, kept, body.add_special_tokens) for prompt, name in zip(given, names, strict=True)
    ]
    scored = body.logprobs is not None
    params = _params(
        body,
        offences,
        {"n": "best_of"} if samples > body.n else {},
        n=samples,
        max_tokens=max(1, body.max_tokens),
        logprobs=scored or samples > body.n,
        top_logprobs=body.logprobs or 0,
        prompt_logprobs=(body.echo and scored) or body.prompt_logprobs is not None,
        constraint=constraint,
    )
    if len(prompts) * samples > served.max_choices:
        name = "n" if samples <= body.n else "best_of"
        offences.append(Offence(f"{len(prompts)} prompts × {name} = {samples} are too many; at most {served.max_choices} choices", name))
    called = {"prompt": "prompt", "max_tokens": "max_tokens"}
    params = _checked(prompts, params, max(1, body.max_tokens), called, served, offences, lengths)
    # With log-probabilities the text is that of the tokens, which a tokenizer that normalizes may spell otherwise: offsets point into it.
    spelled = prompts if scored or kept is not None else given
    echoed = [as_text(prompt, served, special=not body.skip_special_tokens) for prompt in spelled] if body.echo else []
    only_echo = body.max_tokens == 0
    return ParsedRequest(prompts, params, body.stream, *_usage(body), echoed, only_echo, body.n, scored, body.prompt_logprobs)


def conversation(body: ChatBody, served: Served, offences: list[Offence]) -> Conversation | None:
    """What the model's template is to write, for `parse_chat`; None where that is wrong, for the reasons that joined the offences.

    Raises:
        ApiError: 404 for another model; 400 for one without a tokenizer or a template.
    """
    check_model(body.model, served)
    if served.tokenizer is None or served.conversations is None:
        missing = "tokenizer" if served.tokenizer is None else "chat template (partinf serve --chat-template FILE gives it one)"
        raise invalid([*offences, Offence(f"the model has no {missing}; use /v1/completions", "messages")])
    return served.conversations.read(body, offences)


def parse_chat(
    body: ChatBody, served: Served, offences: list[Offence], text: str | None, constraint: Grammar | None = None
) -> ParsedRequest:
    """Of POST /v1/chat/completions; as `parse_completion`.

    Args:
        text: the conversation as the model's template writes it; None where it cannot, for the reasons in `offences`.
    """
    check_model(body.model, served)
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    offences = offences + _offences(body, limit)
    if body.max_tokens not in (None, limit):
        offences.append(Offence(f"max_tokens = {body.max_tokens} and max_completion_tokens = {limit} differ; give one", "max_tokens"))
    if body.top_logprobs and not body.logprobs:
        offences.append(Offence("top_logprobs needs logprobs to be true", "top_logprobs"))
    if body.n > served.max_choices:
        offences.append(Offence(f"n = {body.n} is too many; at most {served.max_choices} choices", "n"))
    lengths: list[Offence] = []
    kept = kept_tokens(body.truncate_prompt_tokens, limit or 1, served.limits)
    prompts = [] if text is None else [encoded(text, "messages", served, offences, lengths, kept, body.add_special_tokens)]
    params = _params(
        body,
        offences,
        {"max_tokens": name},
        n=body.n,
        max_tokens=limit or served.limits.max_context,
        logprobs=body.logprobs,
        top_logprobs=body.top_logprobs,
        constraint=constraint,
        prompt_logprobs=body.prompt_logprobs is not None,
        skip_special_tokens=body.skip_special_tokens and not _calls_are_special(body, served),
    )
    reader = None
    if served.conversations is not None and text is not None:
        reader = served.conversations.reader(body, text)
    least, name = (limit, name) if limit is not None or not body.min_tokens else (body.min_tokens, "min_tokens")
    params = _checked(prompts, params, least or 1, {"prompt": "messages", "max_tokens": name}, served, offences, lengths)
    return ParsedRequest(
        prompts, params, body.stream, *_usage(body), [], False, body.n, body.logprobs, body.prompt_logprobs, reader, _call_id_len(served)
    )


def _calls_are_special(body: ChatBody, served: Served) -> bool:
    """Whether calls are marked by special tokens, which the text must hold then."""
    form = None if served.conversations is None else served.conversations.tool_format
    return form is not None and form.special and bool(body.offered)


def _call_id_len(served: Served) -> int:
    form = None if served.conversations is None else served.conversations.tool_format
    return ParsedRequest.call_id_len if form is None else form.id_len


def check_model(name: str, served: Served) -> None:
    """Raise a 404 for the name of another model."""
    if name not in served.names:
        raise unknown_model(name, served.names)


def _offences(body: SamplingBody, max_tokens: int | None) -> list[Offence]:
    """What is wrong with parameters that depend on others; `max_tokens` is None where there is no bound but the context's."""
    offences = []
    if _usage(body)[0] and not body.stream:
        offences.append(Offence("stream_options needs stream to be true", "stream_options"))
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        offences.append(Offence("include_obfuscation is not supported", "stream_options.include_obfuscation"))
    if max_tokens is not None and body.min_tokens > max_tokens:
        offences.append(Offence(f"min_tokens = {body.min_tokens} is more than the most tokens, {max_tokens}", "min_tokens"))
    if body.truncate_prompt_tokens == 0:
        offences.append(Offence("truncate_prompt_tokens = 0 leaves no prompt; give at least 1, or -1", "truncate_prompt_tokens"))
    if body.prompt_logprobs is not None and body.stream:
        offences.append(Offence("prompt_logprobs are not streamed; leave out one of both", "prompt_logprobs"))
    return offences


def _usage(body: SamplingBody) -> tuple[bool, bool]:
    """Whether a stream ends with the usage, and whether every event has it."""
    options = body.stream_options
    at_end = options is not None and bool(options.include_usage)
    return at_end, at_end and bool(options.continuous_usage_stats)  # type: ignore[union-attr]  # there if at_end


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
            min_tokens=min(body.min_tokens, more["max_tokens"]),
            seed=_seed(body.seed),
            stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            skip_special_tokens=more.pop("skip_special_tokens", body.skip_special_tokens),
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
    lengths: list[Offence],
) -> SamplingParams:
    """The engine's own checks, and whether there is room for the requested tokens.

    Args:
        params: None where they are wrong; the prompts are checked all the same.
        names: how the body calls `prompt` and `max_tokens`. lengths: of prompts that are too long to be encoded.

    Raises:
        ApiError: all offences. Those of length have a code of their own with OpenAI, which is used if nothing else is wrong.
    """
    for place, prompt in enumerate(prompts):
        where = names["prompt"] + (f"[{place}]" if len(prompts) > 1 else "")
        if (offence := length_offence(prompt, where, max_tokens, names["max_tokens"], served.limits)) is not None:
            lengths.append(offence)
        elif not any((known.param or "").startswith(where) for known in offences + lengths):
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


AskFunction = Callable[[Any, Served, list[Offence], str | None, Grammar | None], T]
