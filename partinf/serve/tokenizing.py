"""Texts as token ids and back, for clients that count them."""

from __future__ import annotations

from partinf.engine.constraint import Grammar
from partinf.serve.errors import Offence, invalid, raise_invalid
from partinf.serve.parsed_request import check_model
from partinf.serve.prompts import Served, all_tokens
from partinf.serve.protocol import DetokenizeBody, Text, TokenizeBody, Tokens


def ask_tokens(body: TokenizeBody, served: Served, offences: list[Offence], text: str | None, constraint: Grammar | None = None) -> Tokens:
    """Of POST /tokenize.

    Args:
        offences: what was found already. text: the conversation as the model's template writes it, if there is one.
        constraint: nothing is generated, so nothing is held to it.

    Raises:
        ApiError: 404 for another model; 400 with all offences.
    """
    check_model(body.model or served.names[0], served)
    if (body.prompt is None) == (body.messages is None):
        offences = [*offences, Offence("give either prompt or messages", "prompt")]
    raise_invalid(offences)
    given, name, special = (text, "messages", False) if body.prompt is None else (body.prompt, "prompt", True)
    special = special if body.add_special_tokens is None else body.add_special_tokens
    tokens = all_tokens(given or "", name, served, special)
    tokenizer = served.tokenizer
    strings = [tokenizer.token_text(token) for token in tokens] if body.return_token_strs and tokenizer is not None else None
    return Tokens(len(tokens), served.limits.max_context, tokens, strings)


def ask_text(body: DetokenizeBody, served: Served, offences: list[Offence], text: str | None, constraint: Grammar | None = None) -> Text:
    """Of POST /detokenize; as `ask_tokens`."""
    check_model(body.model or served.names[0], served)
    size = served.limits.vocab_size
    if body.tokens and (largest := max(body.tokens)) >= size:
        offences = [*offences, Offence(f"tokens holds {largest}, which is no token id; valid: 0..{size - 1}", "tokens")]
    raise_invalid(offences)
    if served.tokenizer is None:
        raise invalid([Offence("this model has no tokenizer", "tokens")])
    return Text(served.tokenizer.decode(body.tokens, special=True))
