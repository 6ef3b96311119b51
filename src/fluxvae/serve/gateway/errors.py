"""The errors that the gateway answers with: each class has an HTTP status, and all have the same JSON body.

FluxVAEError
├── GatewayError            an error with an HTTP status of its own
│   ├── InvalidRequest      400   Triton or the model refused the request, and this says so in their words
│   ├── Unauthorized        401   there was no token, or a wrong one
│   ├── Forbidden           403   a web page of another origin sent the request
│   ├── RequestTimeout      408   the body did not arrive in time
│   ├── TooLarge            413   more bytes or pixels than the gateway takes
│   ├── UnsupportedMedia    415   the body is of another type, or compressed
│   ├── Misdirected         421   the request calls the gateway by a name that is not its own
│   ├── ServerError         500   Triton failed inside
│   └── BadGateway          502   Triton does not serve the model, or speaks another protocol
└── UnavailableError        503   of `fluxvae.errors`, whose other classes have the statuses that `status_of` gives
    └── Busy                503   there are too many requests; the answer says when to try again
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
    """An error that has an HTTP status of its own."""

    status = 500
    """The HTTP status of the answer."""
    headers: Mapping[str, str] = {}
    """HTTP headers that the answer has besides the usual ones."""


class InvalidRequest(GatewayError):
    """Triton, or the model, refused the request."""

    status = 400


class Unauthorized(GatewayError):
    """The request has no token, or a wrong one."""

    status = 401
    headers: Mapping[str, str] = {"WWW-Authenticate": 'Bearer realm="fluxvae"'}


class Forbidden(GatewayError):
    """A web page of another origin sent the request."""

    status = 403


class Misdirected(GatewayError):
    """The request calls the gateway by a name that is not its own."""

    status = 421


class RequestTimeout(GatewayError):
    """The request's body did not arrive in time."""

    status = 408


class TooLarge(GatewayError):
    """The request has more bytes, or asks for more pixels, than this gateway takes."""

    status = 413


class UnsupportedMedia(GatewayError):
    """The request's headers do not say that its body is a tensor, or say that it is compressed."""

    status = 415


class ServerError(GatewayError):
    """Triton failed inside; its log has the details."""

    status = 500


class BadGateway(GatewayError):
    """Triton answers, but cannot serve this model to this gateway."""

    status = 502


class Busy(UnavailableError):
    """There are too many requests.

    Args:
        message: what to tell the client.
        retry_after_s: after how many seconds the client had better try again.
    """

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def http_status(error: BaseException) -> int:
    """Return the HTTP status of any error: that of a `GatewayError`, or what `fluxvae.errors.status_of` says."""
    return error.status if isinstance(error, GatewayError) else status_of(error).http


def error_body(kind: str, message: str, request_id: str) -> dict[str, str]:
    """Return the JSON of an answer that is not a 2xx, which ``remote_decode`` raises as its ``RuntimeError``.

    Args:
        kind: the name of the error's class.
        message: what is wrong, what was expected, and what to do.
        request_id: the request's id, by which the logs can be searched.
    """
    return {"error": message, "kind": kind, "request_id": request_id}
