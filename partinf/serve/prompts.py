"""Prompts in the forms that clients give them, as token ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from partinf.checkpoint.tokenizer import Tokenizer, TooLong
from partinf.engine.admission import RequestCheck
from partinf.engine.runner import RunnerLimits
from partinf.foundation.errors import InvalidInput
from partinf.serve.conversations import Conversations
from partinf.serve.errors import Offence, raise_invalid
from partinf.serve.protocol import CompletionBody
from partinf.serve.structures import Structures

MOST_CUT = 1 << 16  # tokens of a text beyond those that fit, where it is to be cut: encoding takes time in proportion to them


@dataclass(frozen=True)
class Served:
    """The served model, as requests see it.

    Attributes:
        names: of the model, the first is the one that answers bear. check: what the engine takes. conversations: how the model's template
            writes them, if it has one.
        structures: compiles what answers are held to; None where nothing can be.
        max_choices: prompts times samples of one request.
    """

    names: tuple[str, ...]
    limits: RunnerLimits
    check: RequestCheck
    tokenizer: Tokenizer | None
    conversations: Conversations | None
    structures: Structures | None = None
    max_choices: int = 256


def given_prompts(body: CompletionBody, served: Served, offences: list[Offence]) -> list[str | list[int]]:
    """One text or list of ids, or a list of either."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [ids]
    if ids:
        offences.append(Offence("prompt mixes token ids with whole prompts; give one list of ids, or a list of prompts", "prompt"))
    if len(prompt) > served.max_choices:
        offences.append(Offence(f"prompt holds {len(prompt)} prompts; at most {served.max_choices}", "prompt"))
        return []
    return [item for item in prompt if not isinstance(item, int)]


def kept_tokens(wanted: int | None, max_tokens: int, limits: RunnerLimits) -> int | None:
    """How many of a prompt's last tokens are kept, by `truncate_prompt_tokens`; None for all."""
    if wanted == -1:
        return max(1, min(limits.max_context - max_tokens, limits.max_prompt_len))
    return wanted or None


def encoded(
    prompt: str | list[int],
    name: str,
    served: Served,
    offences: list[Offence],
    lengths: list[Offence],
    kept: int | None = None,
    special: bool = True,
) -> list[int]:
    """The ids of a prompt; nothing where there is an offence. What is wrong with ids the engine says.

    Args:
        kept: how many of the last ids; None for all. special: begin and end a text as the tokenizer does; not where it names all of its
            special tokens itself.
    """
    if isinstance(prompt, list):
        return prompt if kept is None else prompt[-kept:]
    if served.tokenizer is None:
        offences.append(Offence("this model has no tokenizer; give the prompt as token ids", name))
        return []
    encode = served.tokenizer.encode if special else served.tokenizer.encode_marked
    room = served.limits.max_prompt_len + (0 if kept is None else MOST_CUT)
    found = _ids(encode, prompt, name, room, served.limits, offences, lengths) if prompt else []
    return found if kept is None else found[-kept:]


def all_tokens(text: str, name: str, served: Served, special: bool) -> list[int]:
    """The ids of a text that need not fit the context.

    Raises:
        ApiError: a 400: no tokenizer, far too many ids, or no text.
    """
    offences: list[Offence] = []
    found = encoded(text, name, served, offences, offences, kept=served.limits.max_prompt_len + MOST_CUT, special=special)
    raise_invalid(offences)
    return found


def _ids(
    encode: Callable[..., list[int]],
    text: str,
    name: str,
    room: int,
    limits: RunnerLimits,
    offences: list[Offence],
    lengths: list[Offence],
) -> list[int]:
    """What `encode` makes of a text, which takes time in proportion to it; one that is sure not to fit is refused before."""
    try:
        return encode(text, limit=room)
    except TooLong as error:
        lengths += [Offence(f"{name}: {offence}; the context holds {limits.max_context}", name) for offence in error.offences]
    except InvalidInput as error:
        offences += [Offence(f"{name}: {offence}", name) for offence in error.offences]
    return []


def as_text(prompt: str | list[int], served: Served, special: bool = False) -> str:
    """`special`: special tokens are written by their names."""
    if isinstance(prompt, str):
        return prompt
    return "" if served.tokenizer is None else served.tokenizer.decode(prompt, special=special)


def length_offence(prompt: list[int], name: str, max_tokens: int, max_name: str, limits: RunnerLimits) -> Offence | None:
    """A prompt that is too long, or leaves no room for the requested tokens."""
    context, longest = limits.max_context, limits.max_prompt_len
    if len(prompt) > longest:
        return Offence(f"{name} has {len(prompt)} tokens; the context holds {context}, and the longest prompt is {longest}", name)
    if len(prompt) + max_tokens > context:
        return Offence(f"{max_name} = {max_tokens} is too many after {len(prompt)} tokens of {name}; the context holds {context}", max_name)
    return None
