"""What the endpoints that decode and encode share: their paths, and the service that all of them answer through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from fluxvae.serve.gateway.exchange import Exchange, Service
from fluxvae.serve.gateway.forward import TritonModel
from fluxvae.serve.gateway.query import Limits
from fluxvae.serve.models import encodes

__all__ = ["Endpoint", "path_of"]


def path_of(model: str) -> str:
    """Return the path of the address at which a model is served."""
    return f"/models/{model}/{'encode' if encodes(model) else 'decode'}"


class Endpoint(ABC):
    """Answers every ``POST`` to models of one direction, each of which is at its `path_of`.

    Args:
        models: the models of this direction, by their names.
        limits: what one request may ask for.
        service: what the requests to all models share.
    """

    def __init__(self, models: Mapping[str, TritonModel], *, limits: Limits, service: Service) -> None:
        self._models = models
        self._limits = limits
        self._service = service

    async def __call__(self, request: Request, name: str) -> Response:
        """Answer one request to the model of this name.

        Raises:
            FluxVAEError: the request is refused or failed. The app's handlers turn it into an answer.
        """
        return await self._service.answer(request, lambda exchange: self._respond(exchange, name))

    @abstractmethod
    async def _respond(self, exchange: Exchange, name: str) -> Response:
        """Make the answer."""
