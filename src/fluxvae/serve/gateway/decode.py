"""Answers a request of the ``remote_decode`` protocol with the image, or with an error.

A request is checked in this order, so that bad input costs neither memory nor time: query and headers, announced
length, body, latents; only then Triton is asked. A JSON body is read before the query, because it may hold a part of
it. When a client disconnects, its decode is cancelled.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fluxvae.errors import InvalidLatentsError
from fluxvae.latents.format import PREVIEW_NOTE
from fluxvae.latents.layout import Layout
from fluxvae.serve.families import families_of
from fluxvae.serve.gateway.body import Form, base64_answer, largest_json, read_form, read_json
from fluxvae.serve.gateway.endpoint import Endpoint, path_of
from fluxvae.serve.gateway.errors import InvalidRequest, TooLarge
from fluxvae.serve.gateway.exchange import Exchange
from fluxvae.serve.gateway.forward import Question
from fluxvae.serve.gateway.latents import Latents, read_latents, read_shape, wrong_length
from fluxvae.serve.gateway.remote_decode import Asked, merge, parse
from fluxvae.serve.models import vae_class_of

__all__ = ["DecodeEndpoint", "in_the_querys_words"]


class DecodeEndpoint(Endpoint):
    """Answers every ``POST`` that asks for a decode.

    The first model is also at ``/decode``, and at ``/``, where ``remote_decode`` usually sends.
    """

    async def _respond(self, exchange: Exchange, name: str) -> Response:
        request, model = exchange.request, self._models[name]
        form, query = read_form(request.headers), request.query_params.multi_items()
        if form is Form.BINARY:
            asked, layout = self._read_head(request, name, form, query)
            await exchange.read_body(asked.nbytes, lambda came: wrong_length(came, asked), exactly=True)
        else:  # the body is JSON, which may hold parameters too
            most = largest_json(self._limits.max_request_bytes)
            await exchange.read_body(most, lambda came: _too_large(came, most), copies=2)
            exchange.body, more = await asyncio.to_thread(read_json, exchange.body)
            asked, layout = self._read_head(request, name, form, merge(query, more))
        # Checking 16 MiB of latents takes milliseconds. In a thread it does not keep the other requests waiting.
        latents = await asyncio.to_thread(read_latents, asked, layout, exchange.body)
        try:
            answer = await exchange.ask(model, _question(asked, latents))
        except InvalidRequest as error:
            raise in_the_querys_words(error) from error
        headers = exchange.headers(latents.warning, PREVIEW_NOTE if model.approximate else None)
        return _response(asked, answer, headers)

    def _read_head(self, request: Request, name: str, form: Form, query: list[tuple[str, str]]) -> tuple[Asked, Layout]:
        asked = parse(query, request.headers.get("accept", ""), self._limits, vae_class_of(name), form)
        try:
            return asked, read_shape(asked, self._limits)
        except InvalidLatentsError as error:
            raise InvalidLatentsError(f"{error}{self._elsewhere(asked)}") from None

    def _elsewhere(self, asked: Asked) -> str:
        """Return a sentence that names the addresses that decode latents of this shape, if other models do."""
        families = families_of(asked.shape)
        if asked.vae_class in (*families, "AutoencoderTiny"):
            return ""
        paths = [path_of(name) for name in self._models if vae_class_of(name) in families]
        if len(paths) > 1:  # their latents have one shape, and only who made them knows which they are
            paths = [" or ".join(paths) + ", by the model that made them"]
        return f". This server decodes such latents at {paths[0]}" if paths else ""


def in_the_querys_words(error: InvalidRequest) -> InvalidRequest:
    """Return a model's refusal with what to do about it here, where its ``format`` is the query's ``image_format``.

    jpg is what is meant where the query says none, so that its client may not know that it asked for one.
    """
    what_to_do = ": send image_format=png" if str(error).startswith("format: ") else ""
    return InvalidRequest(f"{error}{what_to_do}")


def _question(asked: Asked, latents: Latents) -> Question:
    """Return what the model is asked."""
    rows = latents.array.shape[0]
    inputs: dict[str, NDArray[Any]] = {"latents": latents.array}
    for name, value in (("height", latents.height), ("width", latents.width)):
        inputs[name] = np.full((rows, 1), value, np.int32)
    file = {"format": asked.image_format} if asked.output == "images_encoded" else {}
    return Question(inputs, asked.output, {**latents.parameters, **file})


def _response(asked: Asked, answer: NDArray[Any], headers: dict[str, str]) -> Response:
    if asked.output == "images_encoded":
        return Response(bytes(answer[0, 0]), media_type=f"image/{asked.image_format}", headers=headers)
    headers |= {"shape": json.dumps(list(answer.shape)), "dtype": str(answer.dtype)}
    if not asked.base64:
        return Response(answer.data.cast("B"), media_type="tensor/binary", headers=headers)
    length, pieces = base64_answer(answer.data.cast("B"), answer.shape, str(answer.dtype))
    return StreamingResponse(pieces, media_type="tensor/base64", headers=headers | {"Content-Length": str(length)})


def _too_large(came: str, most: int) -> TooLarge:
    return TooLarge(f"body: got {came}, more than the {most} that JSON may have here; send fewer images in a request")
