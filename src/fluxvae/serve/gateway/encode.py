"""Answers a request of the ``remote_encode`` protocol with the latents, or with an error.

A request is checked in this order, so that bad input costs neither memory nor time: query and headers, announced
length, body, values; only then Triton is asked. What a picture file holds, only the model looks at. When a client
disconnects, its encode is cancelled.
"""

from __future__ import annotations

import asyncio
import json

from starlette.requests import Request
from starlette.responses import Response

from fluxvae.errors import InvalidOptionError
from fluxvae.serve.gateway.body import refuse_compressed
from fluxvae.serve.gateway.endpoint import Endpoint
from fluxvae.serve.gateway.errors import TooLarge
from fluxvae.serve.gateway.exchange import Exchange
from fluxvae.serve.gateway.forward import MAX_ROWS, Question
from fluxvae.serve.gateway.pictures import read_pictures, wrong_length
from fluxvae.serve.gateway.remote_encode import Asked, parse
from fluxvae.serve.models import vae_class_of

__all__ = ["EncodeEndpoint"]


class EncodeEndpoint(Endpoint):
    """Answers every ``POST`` that asks for an encode.

    The first model is also at ``/encode``.
    """

    async def _respond(self, exchange: Exchange, name: str) -> Response:
        asked = self._read_head(exchange.request, name)
        if (tensor := asked.tensor) is not None:
            await exchange.read_body(tensor.nbytes, lambda came: wrong_length(came, tensor), exactly=True)
        else:
            most = self._limits.max_picture_bytes
            await exchange.read_body(most, lambda came: _too_large(came, most))
        # Values of 192 MiB take some tenths of a second. In a thread they do not keep the other requests waiting.
        pictures = await asyncio.to_thread(read_pictures, asked, exchange.body)
        exchange.body = b""  # for 16-bit floats and files there is a copy now, so that the body need not stay
        question = Question(pictures.inputs, "latents_unpacked", pictures.parameters)
        answer = await exchange.ask(self._models[name], question)
        headers = exchange.headers(pictures.warning)
        headers |= {"shape": json.dumps(list(answer.shape)), "dtype": str(answer.dtype)}
        return Response(answer.data.cast("B"), media_type="tensor/binary", headers=headers)

    def _read_head(self, request: Request, name: str) -> Asked:
        headers = request.headers
        refuse_compressed(headers)
        query = request.query_params.multi_items()
        asked = parse(query, headers.get("content-type", ""), self._limits, vae_class_of(name))
        if asked.tensor is not None and asked.tensor.batch > MAX_ROWS and "sample" in asked.parameters:
            raise InvalidOptionError(
                f"sample: got true for a batch of {asked.tensor.batch}, but one seed draws for at most {MAX_ROWS} "
                "pictures, as many as the model takes at once; send fewer in a request"
            )
        return asked


def _too_large(came: str, most: int) -> TooLarge:
    return TooLarge(f"body: got {came}, more than the {most} of pictures that this gateway takes")
