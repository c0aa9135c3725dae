"""The endpoints. What a request may be is checked here before any of it reaches the engine."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import importlib.metadata
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from partinf.engine.constraint import Grammar
from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput, Overloaded
from partinf.serve.answers import Answer, ChatAnswer, CompletionAnswer
from partinf.serve.bodies import BodyReader, Bounds
from partinf.serve.conversations import Conversation
from partinf.serve.decoding import Body, decode
from partinf.serve.engine_thread import EngineThread, Inbox, ended_well, log_failure
from partinf.serve.errors import ApiError, Offence, failure, invalid, unavailable, unknown_model
from partinf.serve.event_stream import ClientGone, EventStream, broken_off, unless_gone
from partinf.serve.metrics import ServerMetrics
from partinf.serve.parsed_request import AskFunction, ParsedRequest, conversation, parse_chat, parse_completion
from partinf.serve.prompts import Served
from partinf.serve.protocol import ChatBody, CompletionBody, DetokenizeBody, ModelCard, ModelList, SamplingBody, TokenizeBody, Version
from partinf.serve.request_ids import HEADER, RequestIds, log_refusal
from partinf.serve.token_texts import TokenTexts
from partinf.serve.tokenizing import ask_text, ask_tokens

_LARGE = 1 << 13  # bytes of a body that is read by another thread: encoding so many takes some milliseconds
_HUGE, _HUGE_SECONDS = 1 << 20, 10.0  # bytes of a body that waits for others of its size, and how long it does

T = TypeVar("T")

Handler = Callable[[Request], Awaitable[ASGIApp]]
MakeAnswer = Callable[[ParsedRequest, str, str, TokenTexts], Answer]


@dataclass
class Running:
    """A model that is ready to answer."""

    served: Served
    engine: EngineThread
    metrics: ServerMetrics
    texts: TokenTexts
    created: int

    @classmethod
    def of(cls, served: Served, engine: EngineThread) -> Running:
        """Answers are counted from now on."""
        metrics = ServerMetrics(engine.engine, served.names[0])
        engine.on_output = metrics.record
        return cls(served, engine, metrics, TokenTexts(served.tokenizer), int(time.time()))


class Front:
    """The application.

    Attributes:
        running: None until the model is warm. draining: nothing new is taken.
    """

    def __init__(
        self, names: Sequence[str], api_keys: Sequence[str] = (), bounds: Bounds | None = None, cors_origins: Sequence[str] = ()
    ) -> None:
        self.names = tuple(names)
        self.running: Running | None = None
        self.draining = False
        self._keys = [hashlib.sha256(key.encode()).digest() for key in api_keys]
        self._bodies = BodyReader(bounds or Bounds())
        self._huge = asyncio.Semaphore(2)
        completion = self._generates("cmpl", CompletionBody, parse_completion, CompletionAnswer)
        chat = self._generates("chatcmpl", ChatBody, parse_chat, ChatAnswer)
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._guarded(completion), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(chat), methods=["POST"]),
                Route("/v1/models", self._guarded(self._models), methods=["GET"]),
                Route("/v1/models/{name:path}", self._guarded(self._model), methods=["GET"]),
                Route("/tokenize", self._guarded(self._at_once(TokenizeBody, ask_tokens)), methods=["POST"]),
                Route("/detokenize", self._guarded(self._at_once(DetokenizeBody, ask_text)), methods=["POST"]),
                Route("/health", _Endpoint(self._health, probe=True), methods=["GET"]),
                Route("/ping", _Endpoint(self._ping, probe=True), methods=["GET", "POST"]),
                Route("/version", _Endpoint(self._version), methods=["GET"]),
                Route("/metrics", _Endpoint(self._metrics, probe=True), methods=["GET"]),
                Route("/openapi.json", _Endpoint(self._openapi), methods=["GET"]),
            ],
            exception_handlers={HTTPException: _of_starlette},
            middleware=[Middleware(RequestIds), *_cors(cors_origins)],
        )

    def _ready(self) -> Running:
        if self.draining:
            raise unavailable("the server is shutting down", retry_after=10)
        if self.running is None:
            raise unavailable("the model is being loaded and compiled", retry_after=5)
        return self.running

    def _guarded(self, handler: Handler) -> _Endpoint:
        async def checked(request: Request) -> ASGIApp:
            self._check_key(request)
            return await handler(request)

        return _Endpoint(checked)

    def _check_key(self, request: Request) -> None:
        """Every key is compared, each in constant time; digests have one length."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("latin-1")).digest()  # the bytes as they were sent
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if self._keys and not (scheme.lower() == "bearer" and any(matches)):
            what = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, [Offence(what)], code="invalid_api_key", www_authenticate="Bearer")

    def _generates(self, prefix: str, kind: type[Body], ask: AskFunction[ParsedRequest], answers: MakeAnswer) -> Handler:
        """A handler that reads a body, asks the engine, and answers whole or by events."""

        async def handler(request: Request) -> ASGIApp:
            running = self._ready()
            parsed = await self._read(kind, ask, request, running.served)
            inbox = _submit(running.engine, parsed)
            answer = answers(parsed, f"{prefix}-{uuid.uuid4().hex}", running.served.names[0], running.texts)
            if parsed.stream:
                return EventStream(answer, inbox, len(parsed.prompts), parsed.include_usage)
            try:
                outputs = await unless_gone(request.receive, inbox.outputs())
            finally:
                inbox.close()
            ended = [output for samples in outputs for output in samples]
            if not all(map(ended_well, ended)):
                raise broken_off(ended)
            return Response(answer.whole(outputs), media_type="application/json")

        return handler

    def _at_once(self, kind: type[Body], ask: AskFunction[msgspec.Struct]) -> Handler:
        """A handler that reads a body and answers without the engine."""

        async def handler(request: Request) -> ASGIApp:
            return _json(await self._read(kind, ask, request, self._ready().served))

        return handler

    async def _read(self, kind: type[Body], ask: AskFunction[T], request: Request, served: Served) -> T:
        """What a request asks for."""
        raw = await self._bodies.read(request)
        try:
            return await self._parsed(kind, ask, raw, served)
        finally:
            self._ready()  # reading takes time, and ends early when the server does

    async def _parsed(self, kind: type[Body], ask: AskFunction[T], raw: bytes, served: Served) -> T:
        """What a body asks for; few that are huge are read at a time, because of the time and memory that each takes of all."""
        if len(raw) <= _HUGE:
            return await _parse(kind, ask, raw, served)
        try:
            async with asyncio.timeout(_HUGE_SECONDS):
                await self._huge.acquire()
        except TimeoutError:
            raise _overloaded(Overloaded("too many large requests wait to be read", retry_after=_HUGE_SECONDS)) from None
        try:
            return await _parse(kind, ask, raw, served)
        finally:
            self._huge.release()

    async def _models(self, request: Request) -> ASGIApp:
        return _json(ModelList(self._cards()))

    async def _model(self, request: Request) -> ASGIApp:
        name = request.path_params["name"]
        for card in self._cards():
            if card.id == name:
                return _json(card)
        raise unknown_model(name, self.names)

    def _cards(self) -> list[ModelCard]:
        running = self._ready()
        return [ModelCard(name, running.created, running.served.limits.max_context) for name in self.names]

    async def _health(self, request: Request) -> ASGIApp:
        self._ready()
        return _json({"status": "ready"})

    async def _ping(self, request: Request) -> ASGIApp:
        self._ready()
        return Response()

    async def _version(self, request: Request) -> ASGIApp:
        return _json(Version(_version()))

    async def _metrics(self, request: Request) -> ASGIApp:
        if self.running is None:
            raise unavailable("the model is being loaded and compiled", retry_after=5)
        return Response(self.running.metrics.render(), media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: Request) -> ASGIApp:
        return Response(resources.package_file("serve/openapi.json").read_bytes(), media_type="application/json")


class _Endpoint:
    """An ASGI application of one handler, which turns what the handler raises into answers.

    A probe asks whether the server is ready, again and again; that it is not is no refusal, and not logged.
    """

    def __init__(self, handler: Handler, probe: bool = False) -> None:
        self._handler = handler
        self._probe = probe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._handler(Request(scope, receive, send))
        except ApiError as error:
            response = _answer(error) if self._probe else _refusal(error, scope)
        except (ClientGone, ClientDisconnect):
            return
        except Exception as error:
            log_failure(f"{scope['method']} {scope['path']}", error)
            response = _refusal(failure(), scope)
        await response(scope, receive, send)


async def _parse(kind: type[Body], ask: AskFunction[T], raw: bytes, served: Served) -> T:
    """What a body asks for."""
    body, offences, written = await _in_a_thread_if_large(len(raw), _read, kind, raw, served)
    text = None
    if written is not None and served.conversations is not None:
        try:
            text = await served.conversations.text(written, offences)
        except Overloaded as error:
            raise _overloaded(error) from None
    constraint = await _constraint(body, served, offences)
    return await _in_a_thread_if_large(len(raw) + len(text or ""), ask, body, served, offences, text, constraint)


async def _constraint(body: Body, served: Served, offences: list[Offence]) -> Grammar | None:
    """What the answer is held to, compiled."""
    if served.structures is None or not isinstance(body, SamplingBody):
        return None
    try:
        return await served.structures.compile(body, offences)
    except Overloaded as error:
        raise _overloaded(error) from None


def _read(kind: type[Body], raw: bytes, served: Served) -> tuple[Body, list[Offence], Conversation | None]:
    """A body, its offences, and the conversation in it."""
    body, offences = decode(kind, raw, served.max_choices * served.limits.max_prompt_len)
    chat = body if isinstance(body, ChatBody) else body.chat(served.names[0]) if isinstance(body, TokenizeBody) else None
    return body, offences, None if chat is None else conversation(chat, served, offences)


def _version() -> str:
    try:
        return importlib.metadata.version("partinf")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "unknown"


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """Answers to browsers that run pages of these origins; nothing without any."""
    exposed = (HEADER, "retry-after")
    return [Middleware(CORSMiddleware, origins, ("GET", "POST"), ("*",), expose_headers=exposed)] if origins else []


async def _in_a_thread_if_large(size: int, work: Callable[..., T], *given: Any) -> T:
    """What `work` returns; in a thread where there is much to work on, so that others need not wait."""
    return work(*given) if size <= _LARGE else await asyncio.to_thread(work, *given)


def _submit(engine: EngineThread, parsed: ParsedRequest) -> Inbox:
    try:
        return engine.submit(parsed.prompts, parsed.params, parsed.stream)
    except InvalidInput as error:
        raise invalid(map(Offence, error.offences)) from None
    except Overloaded as error:
        raise _overloaded(error) from None


def _overloaded(error: Overloaded) -> ApiError:
    return ApiError(429, [Offence(str(error))], code="overloaded", retry_after=error.retry_after)


async def _of_starlette(request: Request, error: Exception) -> Response:
    """An unknown path or method."""
    assert isinstance(error, HTTPException)
    response = _refusal(ApiError(error.status_code, [Offence(f"{request.method} {request.url.path}: {error.detail}")]), request.scope)
    response.headers.update(error.headers or {})
    return response


def _refusal(error: ApiError, scope: Scope) -> Response:
    log_refusal(scope, error)
    return _answer(error)


def _answer(error: ApiError) -> Response:
    return Response(msgspec.json.encode(error.content), error.status, error.headers, "application/json")


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
