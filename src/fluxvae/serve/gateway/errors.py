"""What the gateway answers when it is not an image: one JSON body, one table of statuses.

FluxVAEError
└── GatewayError            an HTTP status of its own; the classes of `fluxvae.errors` keep theirs (`status_of`)
    ├── Unauthorized        401
    ├── Forbidden           403   a page of another origin
    ├── RequestTimeout      408   the body did not arrive in time
    ├── TooLarge            413
    ├── UnsupportedMedia    415
    ├── Misdirected         421   sent to a name that is not this gateway's
    ├── InvalidRequest      400   Triton refused it, in its own words
    ├── ServerError         500   Triton failed inside
    ├── BadGateway          502   Triton does not serve the model, or speaks another protocol
    ├── Unavailable         503   try again later (Busy: it says when)
    └── GatewayTimeout      504   Triton did not answer in time
"""

from __future__ import annotations

from collections.abc import Mapping

from fluxvae.errors import FluxVAEError, UnavailableError, status_of

__all__ = [
    "BadGateway",
    "Busy",
    "Forbidden",
    "GatewayError",
    "InvalidRequest",
    "Misdirected",
    "RequestTimeout",
    "ServerError",
    "TooLarge",
    "Unauthorized",
    "UnsupportedMedia",
    "error_body",
    "http_status",
]


class GatewayError(FluxVAEError):
    """An answer with an HTTP status of its own."""

    status = 500
    headers: Mapping[str, str] = {}


class InvalidRequest(GatewayError):
    """Triton, or the model, refused the request."""

    status = 400


class Unauthorized(GatewayError):
    """No token, or a wrong one."""

    status = 401
    headers: Mapping[str, str] = {"WWW-Authenticate": 'Bearer realm="fluxvae"'}


class Forbidden(GatewayError):
    """A page of another origin sent this."""

    status = 403


class Misdirected(GatewayError):
    """The request calls the gateway by a name that is not its own."""

    status = 421


class RequestTimeout(GatewayError):
    """The body did not arrive in time."""

    status = 408


class TooLarge(GatewayError):
    """More bytes or pixels than this gateway takes."""

    status = 413


class UnsupportedMedia(GatewayError):
    """A body that does not say that it is a tensor."""

    status = 415


class ServerError(GatewayError):
    """Triton failed inside; its log has the details."""

    status = 500


class BadGateway(GatewayError):
    """Triton answers, but cannot serve this model to this gateway."""

    status = 502


class Busy(UnavailableError):
    """There are too many requests; it says when to try again."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def http_status(error: BaseException) -> int:
    """The HTTP status of any error: its own, or `fluxvae.errors.status_of`'s."""
    return error.status if isinstance(error, GatewayError) else status_of(error).http


def error_body(kind: str, message: str, request_id: str) -> dict[str, str]:
    """The JSON of every answer that is not a 2xx: what remote_decode raises as its ``RuntimeError``."""
    return {"error": message, "kind": kind, "request_id": request_id}
