"""The bodies that come and go, as types: OpenAI's parameters, and of vLLM's those that our sampling has.

What is here is supported; what is named by `refused` is known and answered with a 400; any other name is an error too. Bounds that do not
depend on the model stand in the types, so that the OpenAPI file has them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from partinf.engine.params import MAX_SAMPLES
from partinf.limits import MAX_BIASES, TOP_LOGPROBS
from partinf.serve.decoding import Body

MAX_STOPS = 16

Count = Annotated[int, Meta(ge=1)]
TokenId = Annotated[int, Meta(ge=0)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """`include_usage`: a last event without choices says how many tokens there were."""

    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingBody(Body, frozen=True, kw_only=True):
    """What both endpoints take.

    `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`, `ignore_eos` and `priority` are vLLM's. `user` is accepted, and nothing is
    done with it.
    """

    model: str
    frequency_penalty: Penalty = 0.0
    ignore_eos: bool = False
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] = msgspec.field(
        default_factory=dict
    )
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 1
    presence_penalty: Penalty = 0.0
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)] = 0
    repetition_penalty: Annotated[float, Meta(ge=1e-3, le=1e3)] = 1.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] = msgspec.field(default_factory=list)
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOPS)] = msgspec.field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_k: Annotated[int, Meta(ge=-1)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    user: str | None = None


class CompletionBody(SamplingBody, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    best_of: Count | None = None
    echo: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Meta(ge=0)] = 16

    @classmethod
    def refused(cls) -> dict[str, tuple[object, ...]]:
        return {"suffix": ("",)}


class TextPart(Struct, frozen=True, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str


class Message(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One message of a conversation; which roles make sense is the chat template's to say."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatBody(SamplingBody, frozen=True, kw_only=True):
    """POST /v1/chat/completions. `add_generation_prompt` and `chat_template_kwargs` are vLLM's, given to the template."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    logprobs: bool = False
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS)] = 0

    @classmethod
    def refused(cls) -> dict[str, tuple[object, ...]]:
        return {
            "audio": (),
            "function_call": ("none",),
            "functions": ([],),
            "metadata": ({},),
            "modalities": (["text"],),
            "parallel_tool_calls": (),
            "prediction": (),
            "prompt_cache_key": (),
            "reasoning_effort": (),
            "response_format": ({"type": "text"},),
            "safety_identifier": (),
            "service_tier": ("auto", "default"),
            "store": (False,),
            "tool_choice": ("none",),
            "tools": ([],),
            "verbosity": (),
            "web_search_options": (),
        }


# What goes out. UNSET is left out of the JSON, None is null.


class CachedTokens(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(Struct):
    """The answer of /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprobs]
    refusal: None = None


class ChatText(Struct, omit_defaults=True):
    """A message of ours, or what an event adds to it."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChatChoice(Struct):
    index: int
    message: ChatText | UnsetType = UNSET
    delta: ChatText | UnsetType = UNSET
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletion(Struct):
    """The answer of /v1/chat/completions with `message`s, and each event of its stream with `delta`s."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(Struct, frozen=True):
    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "partinf"


class ModelList(Struct, frozen=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"
