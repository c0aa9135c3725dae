"""What the soak over HTTP asks: bodies with every field beyond the plainest, and what each of them gets when it is alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MODEL = "soak"
CITY = {"type": "object", "properties": {"city": {"enum": ["Zürich", "Bern", "Basel"]}}, "required": ["city"]}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": CITY}},
    {"type": "function", "function": {"name": "register", "parameters": PERSON}},
]
# Of the model: shows tools, writes calls as Hermes does, and marks reasoning.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} answer by <tool_call>{% endif %}{% for message in messages %}{{ message.role }}: "
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.city }})"
    "{% endfor %}\n{% endfor %}{% if think %}<think>\n{% elif never %}</think>{% endif %}"
)


@dataclass
class Ask:
    """A request, and the normal form of what it got alone: per choice its text, reasoning, calls, end, and other figures that it has."""

    path: str
    body: dict[str, Any]
    samples: int = 1
    alone: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def streams(self) -> bool:
        """Whether it may be requested as a stream."""
        return "prompt_logprobs" not in self.body


def drawn(count: int, seed: int) -> list[Ask]:
    """As many of each kind as of the others, in turn."""
    rng = random.Random(seed)
    return [KINDS[number % len(KINDS)](rng) for number in range(count)]


def _completion(rng: random.Random, **fields: Any) -> Ask:
    text = "".join(rng.choices("the quick brown fox, 1 2 3 ", k=rng.randint(8, 800)))
    body = {"model": MODEL, "prompt": text, "max_tokens": rng.randint(8, 150), "seed": rng.randrange(1 << 31)} | fields
    return Ask("/v1/completions", body, body.get("best_of") or body.get("n") or 1)


def _chat(rng: random.Random, **fields: Any) -> Ask:
    messages = [{"role": "user", "content": "".join(rng.choices("does it rain? ", k=rng.randint(8, 300)))}]
    body = {"model": MODEL, "messages": messages, "max_completion_tokens": 60, "seed": rng.randrange(1 << 31)} | fields
    return Ask("/v1/chat/completions", body, body.get("n", 1))


def _held(rng: random.Random) -> dict[str, Any]:
    structures = (
        {"regex": "[a-c]{3,12}( [0-9]{2}){1,4}"},
        {"choice": ["yes", "no", "it rains"]},
        {"grammar": 'start: ("a" | "b")+ "c"'},
        {"json": PERSON},
    )
    return {"structured_outputs": rng.choice(structures), "max_tokens": 120, "temperature": rng.choice((0, 1))}


def _sampled(rng: random.Random) -> dict[str, Any]:
    cuts: tuple[dict[str, Any], ...] = (
        {"top_k": 12},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.5},
    )
    return {"temperature": rng.uniform(0.5, 1.5)} | rng.choice(cuts)


KINDS: tuple[Callable[[random.Random], Ask], ...] = (
    lambda rng: _completion(rng, temperature=0),
    lambda rng: _completion(rng, **_sampled(rng)),
    lambda rng: _completion(rng, **_held(rng)),
    lambda rng: _completion(rng, n=3, **_held(rng)),
    lambda rng: _completion(rng, min_tokens=6, ignore_eos=rng.random() < 0.5, stop_token_ids=[rng.randrange(10, 90)], **_sampled(rng)),
    lambda rng: _completion(rng, prompt_logprobs=1, logprobs=2, temperature=0),
    lambda rng: _completion(rng, echo=True, logprobs=1, temperature=0),
    lambda rng: _completion(rng, truncate_prompt_tokens=16, skip_special_tokens=False, **_sampled(rng)),
    lambda rng: _completion(rng, n=2, best_of=2, logit_bias={str(rng.randrange(9, 90)): 2.0}, **_sampled(rng)),
    lambda rng: _chat(rng, tools=TOOLS, tool_choice="required"),
    lambda rng: _chat(rng, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "register"}}, temperature=0),
    lambda rng: _chat(rng, tools=TOOLS, tool_choice="auto", **_sampled(rng)),
    lambda rng: _chat(rng, tools=TOOLS, tool_choice="none", n=2, **_sampled(rng)),
    lambda rng: _chat(rng, response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}, n=2),
    lambda rng: _chat(rng, response_format={"type": "json_object"}, temperature=0),
    lambda rng: _chat(rng, chat_template_kwargs={"think": True}, min_tokens=4, **_sampled(rng)),
    lambda rng: _chat(rng, add_generation_prompt=False, continue_final_message=True, logprobs=True, top_logprobs=2, temperature=0),
)

# What must be refused with 400 and one offence that names the field, at any load.
WRONG: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"model": MODEL, "prompt": "a", "structured_outputs": {"json": {"type": "spoon"}}}),
    ("/v1/completions", {"model": MODEL, "prompt": "a", "structured_outputs": {"regex": "(" * 40}}),
    ("/v1/completions", {"model": MODEL, "prompt": "a", "min_tokens": -1}),
    ("/v1/completions", {"model": MODEL, "prompt": "a" * 20_000}),
    ("/v1/chat/completions", {"model": MODEL, "messages": [], "tool_choice": "required"}),
    ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "suffix": "b"}),
)


def whole(content: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The normal form of an answer that came whole."""
    found = {}
    for choice in content["choices"]:
        message = choice.get("message") or {"content": choice.get("text")}
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
        found[choice["index"]] = form(message.get("content"), message.get("reasoning_content"), calls, choice["finish_reason"])
    return found


def form(text: str | None, reasoning: str | None, calls: list[tuple[str, str]], reason: str | None) -> dict[str, Any]:
    return {"text": text or "", "reasoning": reasoning or "", "calls": [list(call) for call in calls], "finish_reason": reason}


class Streamed:
    """The normal form of an answer that comes as a stream, as far as it has come."""

    def __init__(self) -> None:
        self.choices: dict[int, dict[str, Any]] = {}

    def hear(self, chunk: dict[str, Any]) -> None:
        for choice in chunk.get("choices", ()):
            message = choice.get("delta") or {"content": choice.get("text")}
            found = self.choices.setdefault(choice["index"], form("", "", [], None))
            found["text"] += message.get("content") or ""
            found["reasoning"] += message.get("reasoning_content") or ""
            for call in message.get("tool_calls") or ():
                if call["index"] == len(found["calls"]):
                    found["calls"].append([call["function"]["name"], ""])
                found["calls"][call["index"]][1] += call["function"].get("arguments") or ""
            found["finish_reason"] = choice.get("finish_reason") or found["finish_reason"]
