"""The bodies that come and go, as types: OpenAI's parameters, and of vLLM's those that our sampling has.

What is here is supported; what is named by `refused` is known and answered with a 400 unless its value asks for nothing; any other name is
an error too, unless it is null. Bounds that do not depend on the model stand in the types, so that the OpenAPI file has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from partinf.engine.params import MAX_SAMPLES
from partinf.foundation.limits import MAX_BIASES, TOP_LOGPROBS
from partinf.serve.decoding import Body, Fields, Idle

MAX_STOPS = 16
MAX_TOOLS = 128
_CONTENT = re.compile(r"messages\[\d+\]\.content")

Count = Annotated[int, Meta(ge=1)]
TokenId = Annotated[int, Meta(ge=0)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]


class StreamOptions(Fields, frozen=True):
    """The contents of a stream in addition to its tokens.

    `include_usage`: a last event without choices says how many tokens there were. `continuous_usage_stats` (vLLM's): every event says how
    many there have been.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Fields, frozen=True):
    """A schema and its name; an answer is always held to it, whatever `strict` says."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Fields, frozen=True):
    """OpenAI's: any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Fields, frozen=True):
    """vLLM's: one of `json` (a schema, or one as text), `regex`, `choice`, `grammar` (Lark's notation or GBNF) and `json_object`."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    @classmethod
    def refused(cls) -> Idle:
        return {"disable_additional_properties": (False,), "disable_fallback": (), "structural_tag": (), "whitespace_pattern": ()}


# Of vLLM's and others' parameters those that this server does not have, with their values there for doing nothing.
_REFUSED: Idle = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "detokenize": (True,),
    "early_stopping": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "request_id": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
}


class SamplingBody(Body, frozen=True, kw_only=True):
    """What both endpoints take.

    `top_k`, `min_p`, `min_tokens`, `repetition_penalty`, `stop_token_ids`, `ignore_eos`, `priority`, `prompt_logprobs` (how many of the
    likeliest tokens besides the prompt's own, 0 or 1), `skip_special_tokens` and `truncate_prompt_tokens` (keep so many of the last tokens
    of a prompt; -1: as many as leave room for the answer) are vLLM's. `metadata`, `parallel_tool_calls`, `prompt_cache_key`,
    `prompt_cache_retention`, `safety_identifier`, `store` and `user` are hints: they are accepted, and nothing is done with them.
    """

    model: str
    frequency_penalty: Penalty = 0.0
    ignore_eos: bool = False
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] = msgspec.field(
        default_factory=dict
    )
    metadata: dict[str, Any] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 1
    parallel_tool_calls: bool | None = None
    presence_penalty: Penalty = 0.0
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)] = 0
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-3, le=1e3)] = 1.0
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    skip_special_tokens: bool = True
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] = msgspec.field(default_factory=list)
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOPS)] = msgspec.field(default_factory=list)
    store: bool | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_k: Annotated[int, Meta(ge=-1)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    user: str | None = None

    @classmethod
    def refused(cls) -> Idle:
        return _REFUSED

    @classmethod
    def inner(cls, given: dict[str, Any]) -> Iterator[tuple[str, type[Fields], Any]]:
        yield "stream_options", StreamOptions, given.get("stream_options")
        yield "structured_outputs", StructuredOutputs, given.get("structured_outputs")
        form = given.get("response_format")
        yield "response_format", ResponseFormat, form
        yield "response_format.json_schema", JsonSchema, form.get("json_schema") if isinstance(form, dict) else None


class CompletionBody(SamplingBody, frozen=True, kw_only=True):
    """POST /v1/completions. Of `best_of` samples the `n` are returned whose tokens are the likeliest on average.

    `add_special_tokens` (vLLM's): begin and end the prompt as the tokenizer does, or take it as it is.
    """

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    add_special_tokens: bool = True
    best_of: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Meta(ge=0)] = 16

    @classmethod
    def refused(cls) -> Idle:
        return _REFUSED | {"suffix": ("",)}


class ToolFunction(Fields, frozen=True, omit_defaults=True):
    """What a tool takes: a JSON schema, which the template shows to the model."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @classmethod
    def refused(cls) -> Idle:
        return {"strict": (False,)}


class Tool(Fields, frozen=True):
    type: Literal["function"]
    function: ToolFunction


class ChosenFunction(Fields, frozen=True):
    name: str


class ToolChoice(Fields, frozen=True):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: ChosenFunction


class TextPart(Fields, frozen=True, tag_field="type", tag="text"):
    """A piece of a content. `cache_control` is a hint for the caches of others."""

    text: str
    cache_control: dict[str, Any] | None = None


class Message(Fields, frozen=True, omit_defaults=True):
    """One message of a conversation; which roles make sense is the chat template's to say.

    What a client got as an answer it can send back: `reasoning_content` and `reasoning` are given to the template, which may use them.
    `cache_control` is a hint for the caches of others.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    cache_control: dict[str, Any] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @classmethod
    def refused(cls) -> Idle:
        return {"annotations": ([],), "audio": (), "function_call": (), "refusal": ()}


def _inner_messages(given: dict[str, Any]) -> Iterator[tuple[str, type[Fields], Any]]:
    messages = given.get("messages")
    for place, message in enumerate(messages if isinstance(messages, list) else ()):
        yield f"messages[{place}]", Message, message
        content = message.get("content") if isinstance(message, dict) else None
        for number, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and part.get("type", "text") == "text":
                yield f"messages[{place}].content[{number}]", TextPart, part


def _inner_tools(given: dict[str, Any]) -> Iterator[tuple[str, type[Fields], Any]]:
    tools = given.get("tools")
    for place, tool in enumerate(tools if isinstance(tools, list) else ()):
        yield f"tools[{place}]", Tool, tool
        yield f"tools[{place}].function", ToolFunction, tool.get("function") if isinstance(tool, dict) else None


class ChatBody(SamplingBody, frozen=True, kw_only=True):
    """POST /v1/chat/completions.

    `add_generation_prompt` (true unless the final message is continued) and `chat_template_kwargs` are vLLM's, given to the template;
    `continue_final_message` lets the answer go on where the last message ends, and `add_special_tokens` lets the tokenizer add those that
    the template does not write. `tools` are shown to the model, whose calls are separated from its text, only the first where
    `parallel_tool_calls` is false; so is what it writes between `<think>` and `</think>`, as `reasoning_content`.
    """

    messages: Annotated[list[Message], Meta(min_length=1)]
    add_generation_prompt: bool | None = None
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    continue_final_message: bool = False
    logprobs: bool = False
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] = msgspec.field(default_factory=list)
    top_logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS)] = 0

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools

    @classmethod
    def refused(cls) -> Idle:
        return _REFUSED | {
            "audio": (),
            "best_of": (1,),
            "chat_template": (),
            "documents": ([],),
            "echo": (False,),
            "function_call": ("none", "auto"),
            "functions": ([],),
            "include_reasoning": (True,),
            "modalities": (["text"],),
            "prediction": (),
            "reasoning_effort": (),
            "verbosity": ("medium",),
            "web_search_options": (),
        }

    @classmethod
    def inner(cls, given: dict[str, Any]) -> Iterator[tuple[str, type[Fields], Any]]:
        yield from super().inner(given)
        yield from _inner_messages(given)
        yield from _inner_tools(given)
        yield "tool_choice", ToolChoice, given.get("tool_choice")

    @classmethod
    def advice(cls, path: str) -> str:
        return '; a content is a text, or a list of parts {"type": "text", "text": "…"}' if _CONTENT.match(path) else ""


class TokenizeBody(Body, frozen=True, kw_only=True):
    """POST /tokenize, vLLM's: of a `prompt`, or of `messages` as the chat template writes them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    continue_final_message: bool = False
    return_token_strs: bool = False
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] = msgspec.field(default_factory=list)

    @classmethod
    def refused(cls) -> Idle:
        return {"chat_template": (), "media_io_kwargs": (), "mm_processor_kwargs": ()}

    @classmethod
    def inner(cls, given: dict[str, Any]) -> Iterator[tuple[str, type[Fields], Any]]:
        yield from _inner_messages(given)
        yield from _inner_tools(given)

    @classmethod
    def advice(cls, path: str) -> str:
        return ChatBody.advice(path)

    def chat(self, model: str) -> ChatBody | None:
        """The request whose prompt this is; None where it is no conversation."""
        if self.messages is None:
            return None
        return ChatBody(
            model=self.model or model,
            messages=self.messages,
            add_generation_prompt=self.add_generation_prompt,
            chat_template_kwargs=self.chat_template_kwargs,
            continue_final_message=self.continue_final_message,
            tools=self.tools,
        )


class DetokenizeBody(Body, frozen=True, kw_only=True):
    """POST /detokenize, vLLM's. Special tokens are written by their names."""

    tokens: Annotated[list[TokenId], Meta(max_length=1 << 18)]
    model: str | None = None


# What goes out. UNSET is left out of the JSON, None is null.


class CachedTokens(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | UnsetType = UNSET


class CompletionLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Struct):
    """vLLM's: `rank` is 1 for the likeliest token, and null where it is not known."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""Per token of a prompt, by token ids; null for the first."""


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


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


class CalledFunction(Struct, omit_defaults=True):
    """`arguments` are the model's own text: JSON, if it wrote that to its end."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCall(Struct, omit_defaults=True):
    """A call, or what an event adds to the one of its `index`."""

    function: CalledFunction
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatText(Struct, omit_defaults=True):
    """A message of ours, or what an event adds to it."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


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
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ModelCard(Struct, frozen=True):
    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "partinf"


class ModelList(Struct, frozen=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokens(Struct, frozen=True):
    """The answer of /tokenize; `token_strs` if requested."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(Struct, frozen=True):
    """The answer of /detokenize."""

    prompt: str


class Version(Struct, frozen=True):
    version: str
