"""Random bodies of requests whose values lie at the ends of what JSON, the protocol and the engine can hold, from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

PATHS = ("/v1/completions", "/v1/chat/completions")
OTHER_PATHS = ("/tokenize", "/detokenize")

_NUMBERS = (
    *("0", "-0", "-0.0", "1", "-1", "2", "3", "20", "21", "128", "129", "255", "256", "257", "65535", "65536"),
    *(str(sign * 2**bits + more) for bits in (7, 8, 15, 16, 31, 32, 53, 63, 64, 127, 128) for sign in (1, -1) for more in (-1, 0, 1)),
    *("1e-1", "1e-10", "1e-30", "1e-38", "1.17e-38", "1e-45", "1e-46", "1e-300", "5e-324", "1e-400", "0.5", "0.9999999999", "1.0000001"),
    *("1.9999", "2.0", "2.0000001", "100", "-100", "100.0001", "1e3", "1e10", "3.4e38", "3.5e38", "1e300", "1.8e308", "1e999", "-1e999"),
    *("9" * 400, "9" * 5000, "0." + "0" * 400 + "1", "1e" + "9" * 30, "NaN", "Infinity", "-Infinity", "1e", "0x10", "01", "1_000"),
)
_USUAL = ("0", "1", "2", "-1", "0.5", "0.999", "-0.0", "1e-30", "1e-38", "1e-45", "16", "20", "128", "2147483647", "4294967295", "null")
_TEXTS = (
    "",
    "a",
    "sort: b a =",
    "</s>",
    "<s>",
    "\u0000",
    "é",
    "e\u0301",
    "😀",
    "\ufeff",
    " ",
    "\n",
    "x" * 5000,
    "true",
    "1",
    "ﷺ" * 500,
    "\u202e",
)
_RAW = (
    *(
        '"\\ud83d"',
        '"\\udc00 x"',
        '"\\ud83d\\ud83d"',
        '"\\u0000"',
        '"\\x"',
        '"',
        "{",
        "[",
        "]",
        "null",
        "true",
        "false",
        "[]",
        "{}",
        "[[]]",
    ),
    *('{"a":' * 60 + "1" + "}" * 60, "[" * 400 + "]" * 400, "[" * 5000 + "]" * 5000, '{"a":' * 2000 + "1" + "}" * 2000, "[null]", "[{}]"),
)


def number(rng: random.Random) -> str:
    return rng.choice(_USUAL if rng.random() < 0.75 else _NUMBERS)


def text(rng: random.Random) -> str:
    return json.dumps(rng.choice(_TEXTS))


def anything(rng: random.Random) -> str:
    return rng.choice((number, text, lambda rng: rng.choice(_RAW)))(rng)


def _numbers(rng: random.Random) -> str:
    return (
        "["
        + ",".join(number(rng) if rng.random() < 0.2 else str(rng.randrange(96)) for _ in range(rng.choice((0, 1, 5, 16, 17, 130))))
        + "]"
    )


def _stops(rng: random.Random) -> str:
    return "[" + ",".join(text(rng) for _ in range(rng.choice((0, 1, 4, 16, 17, 3000)))) + "]"


def _biases(rng: random.Random) -> str:
    count = rng.choice((0, 1, 3, 300, 301, 5000))
    return "{" + ",".join(f'"{rng.choice((place, number(rng), 95, 96))}": {number(rng)}' for place in range(count)) + "}"


def _prompt(rng: random.Random) -> str:
    lists = lambda rng: "[" + ",".join(_numbers(rng) for _ in range(rng.choice((1, 2, 300)))) + "]"  # noqa: E731
    texts = lambda rng: "[" + ",".join(text(rng) for _ in range(rng.choice((1, 3, 257)))) + "]"  # noqa: E731
    return rng.choice((text, _numbers, lists, texts))(rng)


def _message(rng: random.Random) -> str:
    content = rng.choice((text, lambda rng: f'[{{"type": "text", "text": {text(rng)}}}]', anything))(rng)
    role = rng.choice(("user", "user", "assistant", "system", "tool", "king"))
    call = rng.choice(('"{}"', '"{\\"a\\": 1e999}"', '"["', "{}", "null", '"\\ud83d"', json.dumps("[" * 3000)))
    calls = f', "tool_calls": [{{"type": "function", "function": {{"name": "f", "arguments": {call}}}}}]' if rng.random() < 0.1 else ""
    more = f', "{rng.choice(("name", "refusal", "annotations", "audio", "x"))}": {anything(rng)}' if rng.random() < 0.1 else ""
    return f'{{"role": "{role}", "content": {content}{calls}{more}}}'


def _messages(rng: random.Random) -> str:
    return "[" + ",".join(_message(rng) for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 200)))) + "]"


def _options(rng: random.Random) -> str:
    names = ("include_usage", "continuous_usage_stats", "include_obfuscation", "x")
    return (
        "{"
        + ",".join(f'"{rng.choice(names)}": {rng.choice(("true", "false", "null", number(rng)))}' for _ in range(rng.randrange(4)))
        + "}"
    )


def _tools(rng: random.Random) -> str:
    kinds = (
        f'{{"type": "function", "function": {{"name": {text(rng)}, "parameters": {anything(rng)}}}}}',
        '{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}',
        f'{{"type": {text(rng)}}}',
    )
    return "[" + ",".join(rng.choice(kinds) for _ in range(rng.choice((0, 1, 2, 129, 3000)))) + "]"


def _flag(rng: random.Random) -> str:
    return rng.choice(("true", "false", "null", "1"))


Make = Callable[[random.Random], str]
FIELDS: dict[str, Make] = {
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"), number),
    **dict.fromkeys(
        ("n", "best_of", "seed", "priority", "max_tokens", "max_completion_tokens", "min_tokens", "logprobs", "top_logprobs"), number
    ),
    **dict.fromkeys(("prompt_logprobs", "truncate_prompt_tokens"), number),
    **dict.fromkeys(("stream", "echo", "ignore_eos", "store", "skip_special_tokens", "add_generation_prompt"), _flag),
    **dict.fromkeys(("continue_final_message", "add_special_tokens"), _flag),
    **dict.fromkeys(("suffix", "user", "prompt_cache_key", "x", "timeout", "metadata", "response_format", "service_tier"), anything),
    "stop": lambda rng: rng.choice((text, _stops))(rng),
    "stop_token_ids": _numbers,
    "logit_bias": _biases,
    "stream_options": _options,
    "tools": lambda rng: rng.choice((anything, _tools, _tools))(rng),
    "tool_choice": lambda rng: rng.choice(('"auto"', '"none"', '"required"', '{"type": "function", "function": {"name": "f"}}', "{}", "1")),
    "chat_template_kwargs": lambda rng: rng.choice(
        ("{}", "null", f'{{"a": {anything(rng)}, "messages": 1}}', f'{{"tools": {anything(rng)}}}')
    ),
}


_TOKENIZING: dict[str, Make] = {
    "prompt": _prompt,
    "messages": _messages,
    "tokens": _numbers,
    "model": lambda rng: rng.choice(('"demo"', "null", "3", "[]")),
    **dict.fromkeys(("add_special_tokens", "add_generation_prompt", "continue_final_message", "return_token_strs"), _flag),
    "chat_template_kwargs": anything,
}
_NUMBERED = sorted(name for name, make in FIELDS.items() if make in (number, _flag))


def body(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body, which may be no JSON; one in three holds but one strange value, so that much of it is looked at."""
    if rng.random() < 0.1:
        fields = {name: make(rng) for name, make in _TOKENIZING.items() if rng.random() < 0.3}
        return rng.choice(OTHER_PATHS), ("{" + ",".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode()
    path = rng.choice(PATHS)
    own = {"prompt": _prompt(rng)} if path == PATHS[0] else {"messages": _messages(rng)}
    plain = {"prompt": '"sort: b a ="'} if path == PATHS[0] else {"messages": '[{"role": "user", "content": "sort: b a ="}]'}
    few = rng.random() < 0.67
    fields = {"model": '"demo"', "max_tokens": str(rng.randint(1, 12))} | (plain if rng.random() < 0.7 else own)
    names = _NUMBERED if few and rng.random() < 0.8 else sorted(FIELDS)
    for name in rng.sample(names, rng.randint(1, 2) if few else rng.randint(3, 9)):
        fields[name] = FIELDS[name](rng) if rng.random() < 0.95 else anything(rng)
    pairs = [f'"{name}": {value}' for name, value in fields.items()]
    if rng.random() < 0.05:
        pairs.append(rng.choice(pairs))  # a key twice
    rng.shuffle(pairs)
    whole = "{" + ",".join(pairs) + "}"
    if rng.random() < 0.03:
        whole = whole[: rng.randrange(len(whole))]
    return path, whole.encode("utf-8", "surrogatepass")


def bodies(seed: int, count: int) -> Sequence[tuple[str, bytes]]:
    rng = random.Random(seed)
    return [body(rng) for _ in range(count)]
