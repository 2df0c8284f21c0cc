"""An OpenAI-compatible server: chat completions, models, health.

mlx-vlm's own server is not wrapped: its loop is another one (chains only, and penalties are not
applied to drafts), and it opens files and addresses that a request names. Starlette and uvicorn
are what mlx-vlm's server stands on, so they are installed with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flash_mlx.generate import GenerationResponse, join
from flash_mlx.integrations.chat import (
    ChatRequest,
    Limits,
    RequestError,
    parse_request,
    timings,
    usage,
)
from flash_mlx.integrations.engine import Engine, Job

RETRY_SECONDS = 1


@dataclass(frozen=True)
class ServerSettings:
    """How a server serves.

    Attributes:
        model: The name that requests call the model.
        api_key: What clients must send as a bearer token; None lets everyone in.
        max_body: Of a request [bytes].
        max_waiting: Requests that may wait while one is answered.
        hosts: Names by which clients may call the server; `*` stands for all.
        limits: What a request may hold.
    """

    model: str
    api_key: str | None = None
    max_body: int = 32_000_000
    max_waiting: int = 32
    hosts: tuple[str, ...] = ("*",)
    limits: Limits = field(default_factory=Limits)


def make_app(engine: Engine, settings: ServerSettings) -> Starlette:
    """Return the server as an ASGI application.

    Args:
        engine: Answers; closing it is the caller's.
        settings: How to serve.
    """
    server = _Server(engine, settings)
    routes = [
        Route("/health", server.health),
        Route("/v1/models", server.guarded(server.models)),
        Route("/v1/chat/completions", server.guarded(server.chat), methods=["POST"]),
    ]
    # Else a web page could make its own name stand for this machine.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts))
    return Starlette(routes=routes, middleware=[hosts])


Handler = Callable[[Request], Awaitable[Response]]


class _Server:
    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self._engine, self._settings = engine, settings
        self._started = int(time.time())
        self._active = 0

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse({"status": "ok", "requests": self._active})

    async def models(self, request: Request) -> Response:  # noqa: ARG002
        name = self._settings.model
        entry = {"id": name, "object": "model", "created": self._started, "owned_by": "flash-mlx"}
        return JSONResponse({"object": "list", "data": [entry]})

    def guarded(self, handler: Handler) -> Handler:
        """Ask for the key, and turn errors into answers."""

        async def guard(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except RequestError as error:
                headers = {"Retry-After": str(RETRY_SECONDS)} if error.status == 429 else None
                return JSONResponse(error.body(), error.status, headers)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it

        return guard

    async def chat(self, request: Request) -> Response:
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            # Which also keeps web pages out: a browser would have to ask for permission first.
            raise RequestError(415, "not_json", "The content type must be application/json.")
        if self._active > self._settings.max_waiting:
            raise RequestError(
                429, "too_many_requests", f"{self._active} requests are waiting; try again later."
            )
        self._active += 1  # before the body is read, so that few bodies are held at a time
        streaming = False
        try:
            body = await self._read_body(request)
            name, limits = self._settings.model, self._settings.limits
            asked = await asyncio.to_thread(parse_request, body, name, limits)
            job = self._engine.submit(asked)
            pieces = job.pieces()
            async with _watched(request, job):
                first = await _first(pieces)  # an error before any text is an answer of its own
                if not asked.stream:
                    return await _whole(first, pieces, name)
            streaming = True
            return StreamingResponse(
                self._stream(first, pieces, asked), media_type="text/event-stream"
            )
        finally:
            if not streaming:
                self._active -= 1

    def _check_key(self, request: Request) -> None:
        key = self._settings.api_key
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(sent.encode(), key.encode()):
            raise RequestError(401, "invalid_api_key", "The API key must be the server's.")

    async def _read_body(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._settings.max_body:
                raise RequestError(
                    413, "too_large", f"A request may have {self._settings.max_body} bytes."
                )
        return bytes(body)

    async def _stream(
        self,
        first: GenerationResponse,
        pieces: AsyncIterator[GenerationResponse],
        asked: ChatRequest,
    ) -> AsyncIterator[str]:
        start = _head(self._settings.model, "chat.completion.chunk")

        def event(choices: list[dict[str, Any]], **more: object) -> str:
            return f"data: {json.dumps({**start, 'choices': choices, **more})}\n\n"

        try:
            yield event([_choice({"role": "assistant", "content": ""})])
            last = first
            async for piece in _chain(first, pieces):
                last = piece
                if piece.text:
                    yield event([_choice({"content": piece.text})])
            yield event([_choice({}, last.finish_reason)], timings=timings(last))
            if asked.include_usage:
                yield event([], usage=usage(last))
            yield "data: [DONE]\n\n"
        except RequestError as error:
            yield f"data: {json.dumps(error.body())}\n\n"
        finally:
            self._active -= 1
            await _close(pieces)


@contextlib.asynccontextmanager
async def _watched(request: Request, job: Job) -> AsyncIterator[None]:
    """Give a job up when its client leaves."""
    gone = asyncio.ensure_future(request.receive())  # the body is read: what comes is its leaving
    gone.add_done_callback(lambda task: None if task.cancelled() else job.cancel())
    try:
        yield
    except BaseException:
        job.cancel()
        raise
    finally:
        gone.cancel()


async def _whole(
    first: GenerationResponse, pieces: AsyncIterator[GenerationResponse], model: str
) -> Response:
    answer = join([piece async for piece in _chain(first, pieces)])
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
    return JSONResponse(
        {
            **_head(model, "chat.completion"),
            "choices": [{**choice, "logprobs": None}],
            "usage": usage(answer),
            "timings": timings(answer),
        }
    )


async def _first(pieces: AsyncIterator[GenerationResponse]) -> GenerationResponse:
    """Return the first piece.

    Raises:
        RequestError: What the request asks cannot be done, or the engine failed.
        ClientDisconnect: The client has left.
    """
    try:
        return await anext(pieces)
    except StopAsyncIteration:
        raise ClientDisconnect from None
    except Exception as error:
        raise _as_request_error(error) from error


async def _chain(
    first: GenerationResponse, pieces: AsyncIterator[GenerationResponse]
) -> AsyncIterator[GenerationResponse]:
    yield first
    try:
        async for piece in pieces:
            yield piece
    except Exception as error:
        raise _as_request_error(error) from error


def _as_request_error(error: Exception) -> RequestError:
    if isinstance(error, ValueError | OSError):
        return RequestError(400, "invalid_value", " ".join(str(error).split()))
    return RequestError(500, "internal_error", f"The server failed: {type(error).__name__}.")


async def _close(pieces: AsyncIterator[GenerationResponse]) -> None:
    with contextlib.suppress(RuntimeError):
        await pieces.aclose()  # type: ignore[attr-defined]


def _head(model: str, kind: str) -> dict[str, object]:
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def _choice(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}
