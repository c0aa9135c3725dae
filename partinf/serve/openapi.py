"""The OpenAPI description of the server, made of the types that check its requests. `python -m partinf.serve.openapi` writes the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from partinf.serve.errors import Offence
from partinf.serve.protocol import (
    ChatBody,
    ChatCompletion,
    Completion,
    CompletionBody,
    DetokenizeBody,
    ModelCard,
    ModelList,
    Text,
    TokenizeBody,
    Tokens,
    Version,
)

FILE = Path(__file__).with_name("openapi.json")
_BODIES = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)
_ERRORS = {
    400: "Every offence, each with its parameter.",
    401: "No API key, or a wrong one.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too many requests wait; Retry-After says when to try again.",
    500: "The server failed.",
    503: "Loading, draining, or too many connections.",
}


class Error(msgspec.Struct):
    """OpenAI's form of an error, with `offences` where there are several."""

    message: str
    type: str
    param: str | None
    code: str | None
    offences: list[Offence] = msgspec.field(default_factory=list)


class ErrorBody(msgspec.Struct):
    error: Error


def description() -> dict[str, Any]:
    """The document."""
    kinds = (*_BODIES, Completion, ChatCompletion, Tokens, Text, Version, ModelCard, ModelList, ErrorBody)
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for body in _BODIES:
        schemas[body.__name__]["additionalProperties"] = False
        if "logit_bias" in schemas[body.__name__]["properties"]:
            schemas[body.__name__]["properties"]["logit_bias"]["propertyNames"] = {"pattern": "^[0-9]+$"}  # token ids
        if refused := body.refused():
            schemas[body.__name__]["description"] += f"\n\nNot supported: {', '.join(sorted(refused))}."
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "partinf serve",
            "version": "1",
            "description": "OpenAI's completions and chat completions. A parameter that is null counts as absent; one that is not listed "
            "here is refused.",
        },
        "paths": {
            "/v1/completions": {"post": _generating("completions", "Continue prompts", CompletionBody, Completion)},
            "/v1/chat/completions": {"post": _generating("chat", "Answer a conversation", ChatBody, ChatCompletion)},
            "/v1/models": {"get": _reading("models", "The names of the model", ModelList, 401, 503)},
            "/v1/models/{name}": {"get": _reading("model", "One name of the model", ModelCard, 401, 404, 503) | {"parameters": [name]}},
            "/tokenize": {"post": _computing("tokenize", "The tokens of a text or of a conversation", TokenizeBody, Tokens)},
            "/detokenize": {"post": _computing("detokenize", "The text of tokens", DetokenizeBody, Text)},
            "/ping": {"get": _empty("ping", "Whether requests are taken"), "post": _empty("pinged", "Whether requests are taken")},
            "/version": {"get": _open("version", "Of the library", "application/json", _schema(Version))},
            "/health": {"get": _open("health", "Whether requests are taken", "application/json", {"type": "object"})},
            "/metrics": {"get": _open("metrics", "Prometheus' text format", "text/plain", {"type": "string"})},
        },
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def text() -> str:
    """The document as the file has it."""
    return json.dumps(description(), indent=1, sort_keys=True) + "\n"


def _generating(name: str, summary: str, body: type, answer: type) -> dict[str, Any]:
    content = _json(body)
    data = {"type": "string", "description": f"A {answer.__name__} as JSON, or an error; the last is [DONE]."}
    events = {"text/event-stream": {"schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}}  # of each event
    return {
        "operationId": name,
        "summary": summary,
        "security": [{"key": []}, {}],
        "requestBody": {"required": True, "content": content},
        "responses": {"200": {"description": "The answer.", "content": _json(answer) | events}} | _errors(*_ERRORS),
    }


def _reading(name: str, summary: str, answer: type, *errors: int) -> dict[str, Any]:
    responses = {"200": {"description": summary, "content": _json(answer)}} | _errors(*errors)
    return {"operationId": name, "summary": summary, "security": [{"key": []}, {}], "responses": responses}


def _open(name: str, summary: str, media: str, schema: dict[str, Any]) -> dict[str, Any]:
    responses = {"200": {"description": summary, "content": {media: {"schema": schema}}}} | _errors(503)
    return {"operationId": name, "summary": summary, "responses": responses}


def _computing(name: str, summary: str, body: type, answer: type) -> dict[str, Any]:
    """As `_generating`, without a stream."""
    found = _generating(name, summary, body, answer)
    found["responses"]["200"]["content"] = _json(answer)
    return found


def _empty(name: str, summary: str) -> dict[str, Any]:
    return {"operationId": name, "summary": summary, "responses": {"200": {"description": summary}} | _errors(503)}


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(status): {"description": _ERRORS[status], "content": _json(ErrorBody)} for status in statuses}


def _json(kind: type) -> dict[str, Any]:
    return {"application/json": {"schema": _schema(kind)}}


def _schema(kind: type) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


if __name__ == "__main__":
    FILE.write_text(text())
