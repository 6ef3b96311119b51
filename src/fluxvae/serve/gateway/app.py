"""Puts the HTTP gateway together: the protocols of diffusers' ``remote_decode`` and ``remote_encode`` in front of the
Triton models, and a web page.

`command` runs it as a server. The gateway has no TLS and no limits for single clients; a reverse proxy in front of it
can add them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from fluxvae import __version__
from fluxvae.errors import FluxVAEError, InvalidOptionError
from fluxvae.serve.gateway.decode import DecodeEndpoint
from fluxvae.serve.gateway.encode import EncodeEndpoint
from fluxvae.serve.gateway.endpoint import Endpoint, path_of
from fluxvae.serve.gateway.errors import error_body
from fluxvae.serve.gateway.exchange import Service
from fluxvae.serve.gateway.forward import TritonModel, read_metrics
from fluxvae.serve.gateway.hosts import is_loopback, read_allowed_host
from fluxvae.serve.gateway.http import GatewayMetrics, OuterLayer, error_response, request_id_of
from fluxvae.serve.gateway.openapi import document
from fluxvae.serve.gateway.pages import Pages
from fluxvae.serve.gateway.query import Limits
from fluxvae.serve.gateway.readiness import Readiness
from fluxvae.serve.models import MODEL, encodes

__all__ = ["GatewaySettings", "make_app"]

_NAME = re.compile(r"[\w.-]+")
_BODIES = 32
"""How many bodies with the most bytes of latents the gateway holds in memory, until they are answered; or two of
pictures, where they are larger. One address may hold half as many."""
_OPEN = frozenset({"/healthz", "/readyz"})
"""The paths that need no token, because what watches the gateway asks them."""
_TOLD_LIMITS = ("max_request_bytes", "max_picture_bytes", "max_pixels", "timeout_s")
"""The limits that ``/info`` tells."""
_EXAMPLES = {path.name: path for path in sorted((Path(__file__).parents[2] / "assets/latents").glob("*.safetensors"))}


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """Where the gateway finds Triton, who may call it, and what a request may ask for.

    Raises:
        InvalidOptionError: a limit is not above 0, the token is empty, or a name of a model or host is none.
    """

    triton_grpc_url: str
    """The ``host:port`` of Triton's gRPC endpoint."""
    triton_metrics_url: str | None = None
    """The whole address of Triton's metrics page. None leaves Triton's metrics out of ``/metrics``."""
    triton_config_key: str | None = None
    """The key for the models' configuration, where Triton guards it (see `fluxvae.serve.triton.controls`)."""
    models: Sequence[str] = (MODEL,)
    """The names of the models. Each is served at ``/models/NAME/decode`` or ``/models/NAME/encode``, the first that
    decodes also at ``/`` and ``/decode``, the first that encodes also at ``/encode``."""
    token: str | None = None
    """The token that clients must send, except to ``/healthz`` and ``/readyz``. None lets everyone in."""
    host: str = "127.0.0.1"
    """The address that the gateway is bound to."""
    allowed_hosts: Sequence[str] = ()
    """Host names by which requests may call the gateway, besides those of loopback. Where some are given, or where the
    gateway is bound to loopback without a token, no other name is answered; otherwise any name is."""
    max_request_bytes: int = 16 * 2**20
    """The largest number of bytes of latents in one request. By default they are those of 4096x4096 pixels in
    float32."""
    max_picture_bytes: int = 192 * 2**20
    """The largest number of bytes of pictures in one request. By default they are those of 4096x4096 pixels in
    float32."""
    max_pixels: int = 4096 * 4096
    """The largest number of pixels that all images of one request may have together. The model's own ``max_pixels``
    holds besides."""
    timeout_s: float = 300.0
    """How many seconds may pass from the beginning of a request to its answer."""
    max_in_flight: int = 64
    """How many decodes and encodes may be under way at the same time. By default they are as many as a model's queue
    holds."""
    max_queue: int = 512
    """How many more requests may wait until one of those is done. With 0 none may."""

    def __post_init__(self) -> None:
        if not self.models or len(set(self.models)) < len(self.models) or not all(map(_NAME.fullmatch, self.models)):
            raise InvalidOptionError(f"models: got {', '.join(self.models)!r}, expected names, each once")
        for name in ("max_request_bytes", "max_picture_bytes", "max_pixels", "timeout_s", "max_in_flight"):
            if not getattr(self, name) > 0:
                raise InvalidOptionError(f"{name}: got {getattr(self, name)}, expected a number above 0")
        if self.max_queue < 0:
            raise InvalidOptionError(f"max_queue: got {self.max_queue}, expected 0 or more")
        if self.token is not None and not self.token.strip():
            raise InvalidOptionError("token: got an empty one; FLUXVAE_TOKEN must hold a secret, or not be set at all")
        for host in self.allowed_hosts:
            read_allowed_host(host)

    @property
    def checked_hosts(self) -> frozenset[str] | None:
        """The host names besides loopback's that `OuterLayer` allows; None where it allows any."""
        if self.allowed_hosts or (self.token is None and is_loopback(self.host)):
            return frozenset(map(read_allowed_host, self.allowed_hosts))
        return None


def make_app(settings: GatewaySettings) -> ASGIApp:
    """Make the gateway's ASGI app. It connects to Triton when the ASGI lifespan begins, and disconnects at its end.

    Args:
        settings: all that the app needs to know.
    """
    metrics = GatewayMetrics()
    pages = Pages(__version__)
    limits = Limits(
        max_request_bytes=settings.max_request_bytes,
        max_picture_bytes=settings.max_picture_bytes,
        max_pixels=settings.max_pixels,
    )
    openapi = document(limits, __version__, models=settings.models, token=settings.token is not None)
    decoders = [name for name in settings.models if not encodes(name)]
    encoders = [name for name in settings.models if encodes(name)]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        models = {
            name: TritonModel(settings.triton_grpc_url, name, settings.triton_config_key) for name in settings.models
        }
        readiness = [Readiness(model) for model in models.values()]
        service = Service(
            timeout_s=settings.timeout_s,
            max_in_flight=settings.max_in_flight,
            max_queue=settings.max_queue,
            max_body_bytes=max(_BODIES * settings.max_request_bytes, 2 * settings.max_picture_bytes),
            metrics=metrics,
        )
        decode = DecodeEndpoint({name: models[name] for name in decoders}, limits=limits, service=service)
        encode = EncodeEndpoint({name: models[name] for name in encoders}, limits=limits, service=service)
        try:
            yield {"models": models, "readiness": readiness, "decode": decode, "encode": encode}
        finally:
            for each in readiness:
                await each.close()
            for model in models.values():
                await model.close()

    def answer_with(name: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            endpoint: Endpoint = request.state.encode if encodes(name) else request.state.decode
            return await endpoint(request, name)

        return answer

    async def root(request: Request) -> Response:
        if request.method != "POST":
            return pages.main()
        if not decoders:
            raise HTTPException(404)
        return await answer_with(decoders[0])(request)

    async def docs(request: Request) -> Response:
        return pages.docs(openapi)

    async def openapi_json(request: Request) -> Response:
        return JSONResponse(openapi)

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def readyz(request: Request) -> Response:
        reasons = await asyncio.gather(*(each.reason_against() for each in request.state.readiness))
        against = [f"{name}: {why}" for name, why in zip(settings.models, reasons, strict=True) if why is not None]
        if not against:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": "; ".join(against)}, 503, {"Retry-After": "1"})

    async def metrics_page(request: Request) -> Response:
        theirs = await read_metrics(settings.triton_metrics_url) if settings.triton_metrics_url else None
        metrics.triton_up.set(theirs is not None)
        return PlainTextResponse(
            generate_latest(metrics.registry).decode() + (theirs or ""), media_type=CONTENT_TYPE_LATEST
        )

    async def info(request: Request) -> Response:
        facts = {name: await model.facts() for name, model in request.state.models.items()}
        models = {name: {**of_it, "path": path_of(name)} for name, of_it in facts.items()}
        limited = {name: getattr(settings, name) for name in _TOLD_LIMITS}
        first = (decoders or encoders)[0]
        known = {"fluxvae": __version__, **facts[first], "models": models, "limits": limited}
        return JSONResponse({**known, "examples": list(_EXAMPLES)})

    async def example(request: Request) -> Response:
        path = _EXAMPLES.get(request.path_params["name"])
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, media_type="application/octet-stream")

    app = Starlette(
        routes=[
            Route("/", root, methods=["GET", "POST"]),
            *(Route("/decode", answer_with(name), methods=["POST"]) for name in decoders[:1]),
            *(Route("/encode", answer_with(name), methods=["POST"]) for name in encoders[:1]),
            *(Route(path_of(name), answer_with(name), methods=["POST"]) for name in settings.models),
            Route("/docs", docs),
            Route("/openapi.json", openapi_json),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", metrics_page),
            Route("/info", info),
            Route("/examples/{name}", example),
        ],
        exception_handlers={FluxVAEError: _on_error, HTTPException: _on_http_error, Exception: _on_bug},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.models = settings.models
    return OuterLayer(
        app,
        token=settings.token,
        allowed_hosts=settings.checked_hosts,
        open_paths=_OPEN,
        known_paths=frozenset(route.path for route in app.routes if isinstance(route, Route)),
        ask_for_token=pages.ask_for_token,
        metrics=metrics,
    )


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(error, request_id_of(request))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    served = f". It serves {', '.join(request.app.state.models)}" if request.method == "POST" else ""
    kind, message = {
        404: ("NotFound", f"path: got {request.url.path[:80]!r}, which is not here; GET /docs lists what is{served}"),
        405: ("MethodNotAllowed", f"method: got {request.method[:20]} on {request.url.path[:80]!r}; see GET /docs"),
    }.get(error.status_code, ("HTTPError", error.detail))
    body = error_body(kind, message, request_id_of(request))
    return JSONResponse(body, error.status_code, error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    request_id = request_id_of(request)
    message = f"internal error; the gateway's log has the details under request {request_id}"
    return JSONResponse(error_body("InternalError", message, request_id), 500)
