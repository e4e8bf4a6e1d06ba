"""``jaxalign serve``: an OpenAI-compatible server over the engine.

POST /v1/chat/completions, /v1/completions, /tokenize and /detokenize, GET /v1/models,
/metrics and /health. Whatever a client sends, it gets an answer or an error object; one
that goes away frees its slots.
"""

import asyncio
import contextlib
import json
import socket
import traceback
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

from jaxalign.checkpoints import fastest
from jaxalign.errors import UserError
from jaxalign.generation import text_model
from jaxalign.generation.engine import Event
from jaxalign.generation.serving import metrics, tokens, wire
from jaxalign.generation.serving.access import KeyRequired, read_key
from jaxalign.generation.serving.answers import Growing, Piece, ResponseBody, echoed
from jaxalign.generation.serving.bodies import DetokenizeBody, TokenizeBody
from jaxalign.generation.serving.driver import Call, EngineFailed
from jaxalign.generation.serving.service import ServeConfig, Service, make_engine
from jaxalign.generation.serving.wire import ApiError, ChatBody, CompletionBody, parse


try:
    import fastapi
    import uvicorn
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise UserError(
        f"jaxalign serve needs a package that is not installed ({error.name}): "
        "pip install 'jaxalign[serve]'"
    ) from None


__all__ = ["ServeConfig", "make_app", "serve"]

_MOST_BYTES = {False: 4 * 2**20, True: 64 * 2**20}
"""Of a request's body, by whether it may have pictures."""


async def _answer(
    service: Service,
    request: fastapi.Request,
    kind: type[ChatBody] | type[CompletionBody],
) -> Response:
    """Answer a POST.

    Raises:
      ApiError: what the client did wrong, or what keeps us from answering.
      EngineFailed: it did, on the way.
    """
    body = await _body_of(service, request)
    service.check_open()
    with contextlib.ExitStack() as stack:
        stack.enter_context(service.counted())
        stack.enter_context(service.metrics.timed(request.url.path))
        asked = parse(body, kind)
        service.check_model(asked.model)
        requests = await service.requests_of(asked)
        call = service.submit(requests)
        stack.callback(call.close)
        answer = ResponseBody(asked, requests, service.made.tokenizer)
        pieces = _pieces(service, call, answer)
        if asked.stream:
            return _Stream(_lines(answer, pieces), stack.pop_all())
        # Closes the call if the client goes, which ends the pieces.
        watch = asyncio.create_task(_close_when_gone(request, call))
        stack.callback(watch.cancel)
        found: dict[int, list[Piece]] = {}
        async for index, piece in pieces:
            found.setdefault(index, []).append(piece)
        if call.texts_left:
            return Response(status_code=499)  # which nobody reads
        return JSONResponse(answer.whole(found))


class _Stream(StreamingResponse):
    """Server-sent events; ``stack`` is closed however they end."""

    def __init__(self, lines: AsyncIterator[str], stack: contextlib.ExitStack):
        super().__init__(lines, media_type="text/event-stream")
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._stack:
            await super().__call__(scope, receive, send)


async def _body_of(service: Service, request: fastapi.Request) -> bytes:
    found, most = bytearray(), _MOST_BYTES[service.sees]
    async for piece in request.stream():
        found += piece
        if len(found) > most:
            raise ApiError(
                f"the body is longer than {most} bytes",
                status=413,
                code="request_too_large",
            )
    return bytes(found)


async def _close_when_gone(request: fastapi.Request, call: Call) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    call.close()


async def _pieces(
    service: Service, call: Call, answer: ResponseBody
) -> AsyncIterator[tuple[int, Piece]]:
    """Yield (index of the choice, piece) as texts grow."""
    text_of = text_model.text_with(service.made.tokenizer)
    growing: dict[int, Growing] = {}
    told: dict[int, list[Event]] = {}
    prompts: dict[int, Piece] = {}
    asked = answer.asked
    async for number, event in call.events():
        if event.sample is None:
            told.setdefault(number, []).append(event)
            continue
        request = answer.requests[number]
        index = number * request.sampling.num_samples + event.sample
        if index not in growing:
            offset = 0
            if asked.echo:
                if number not in prompts:
                    events, text = told.pop(number, ()), asked.text(number)
                    prompts[number] = echoed(request, events, text, text_of)
                offset = len(prompts[number].text)
                yield index, prompts[number]
            growing[index] = Growing(request, text_of, offset)
        if asked.only_prompt:
            yield index, Piece("", [], "length")
            continue
        if event.finish_reason == "error":
            raise ApiError(
                "the structure became too much for the library on the way: "
                f"{asked.structure_field} is too ambiguous",
                status=500,
                code="structure_failed",
            )
        answer.count()
        service.metrics.count_completion()
        piece = growing[index].add(event)
        if piece is not None:
            yield index, piece


async def _lines(
    answer: ResponseBody, pieces: AsyncIterator[tuple[int, Piece]]
) -> AsyncIterator[str]:
    if answer.asked.is_chat:
        for index in range(answer.requests[0].sampling.num_samples):
            yield _line(answer.opening(index))
    try:
        async for index, piece in pieces:
            yield _line(answer.chunk(index, piece))
    except EngineFailed as error:
        yield _line(ApiError(str(error), status=500, code="engine_failed").body)
        return
    except ApiError as error:
        yield _line(error.body)
        return
    if answer.asked.include_usage:
        yield _line(answer.closing())
    yield "data: [DONE]\n\n"


def _line(value: dict[str, Any]) -> str:
    # In ASCII: some clients take other characters for ends of lines.
    return f"data: {json.dumps(value)}\n\n"


def make_app(service: Service, key: str | None = None) -> fastapi.FastAPI:
    """Return the routes; the engine's thread runs as long as the app does.

    Args:
      service: what the routes share.
      key: that requests must have; None for no key.
    """
    app = fastapi.FastAPI(
        title="jaxalign",
        openapi_url=None,
        redirect_slashes=False,
        lifespan=service.running,
    )
    if key is not None:
        app.add_middleware(KeyRequired, key=key)
    origins = service.config.allowed_origins
    if origins:  # outermost, as browsers ask for leave without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    _add_routes(app, service)
    for kind in (ApiError, EngineFailed, ClientDisconnect, HTTPException, Exception):
        app.add_exception_handler(kind, _refused)
    return app


def _add_routes(app: fastapi.FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        try:
            service.check_open()
        except ApiError as error:
            return JSONResponse({"status": error.code}, error.status)
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service.name)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(_model(service.name))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: fastapi.Request) -> Response:
        return await _answer(service, request, ChatBody)

    @app.post("/v1/completions")
    async def completions(request: fastapi.Request) -> Response:
        return await _answer(service, request, CompletionBody)

    @app.post("/tokenize")
    async def tokenize(request: fastapi.Request) -> Response:
        body = wire.read(await _body_of(service, request), TokenizeBody)
        service.check_model(body.model or service.name)
        prompt = await service.looked_up(tokens.prompt_of(body))
        given = service.made.renderer, prompt, body, service.config.max_length
        found = await service.with_tokenizer(tokens.tokenize, *given)
        return JSONResponse(found)

    @app.post("/detokenize")
    async def detokenize(request: fastapi.Request) -> Response:
        body = wire.read(await _body_of(service, request), DetokenizeBody)
        service.check_model(body.model or service.name)
        tokenizer = service.made.tokenizer
        found = await service.with_tokenizer(tokens.detokenize, tokenizer, body)
        return JSONResponse(found)

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "jaxalign"}


async def _refused(request: fastapi.Request, error: Exception) -> Response:
    """Return any error as OpenAI's clients expect it."""
    headers = None
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # which nobody reads
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path[:80]}: {error.detail}"
        headers, error = error.headers, ApiError(what, status=error.status_code)
    elif isinstance(error, EngineFailed):
        error = ApiError(str(error), status=500, code="engine_failed")
    elif not isinstance(error, ApiError):
        traceback.print_exception(error)
        error = ApiError("the server made a mistake", status=500)
    return JSONResponse(error.body, error.status, headers)


class _Server(uvicorn.Server):
    """Says when it is ready; a first signal drains, a second one ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: str):
        super().__init__(config)
        self.service, self.ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        print(self.ready, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            super().handle_exit(sig, frame)
            self.force_exit = True
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        drained = self.service.draining and not self.service.answering
        return await super().on_tick(counter) or drained


def serve(config: ServeConfig) -> None:
    """Serve until a signal, and until what has been asked before it is answered.

    Raises:
      UserError: the address cannot be listened on, the key cannot be read, or see
        ``text_model.load``.
    """
    key = read_key(config.api_key_file)
    with _listen(config) as listener:
        dtype = fastest.resolve(config.dtype, config.model)
        made = text_model.load(
            config.model,
            config.adapter,
            dtype=dtype,
            quantize=config.quantize,
            mesh=config.mesh,
            template_kwargs=config.chat_template_kwargs,
            max_pixels=config.max_pixels,
        )
        service = Service(config, made, make_engine(config, made))
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        options = uvicorn.Config(
            make_app(service, key),
            log_level="warning",
            lifespan="on",
            # Once all is answered: for those who never end what they send.
            timeout_graceful_shutdown=10,
        )
        where = f"serving {service.name} on http://{shown}:{port}"
        server = _Server(options, service, where)
        try:
            server.run(sockets=[listener])
        finally:
            service.driver.stop()


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # No backlog yet: nobody is to wait while the model is loaded.
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {config.host}, port {config.port}: {error.strerror}. "
            "Give another --port, 0 for any that is free"
        ) from None
    return listener
