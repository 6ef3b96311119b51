"""Makes the gateway's OpenAPI document: its pages, and the operations of the models that are served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxvae.serve.gateway.endpoint import path_of
from fluxvae.serve.gateway.operations import BINARY, decode_operation, encode_operation
from fluxvae.serve.gateway.query import Limits
from fluxvae.serve.models import MODEL, encodes

__all__ = ["document"]


def document(limits: Limits, version: str, *, models: Sequence[str] = (MODEL,), token: bool) -> dict[str, Any]:
    """Make the OpenAPI document, a dictionary for JSON.

    Args:
        limits: what a request may ask for.
        version: the version of fluxvae.
        models: the names of the models that are served; the first that decodes is at ``/`` and ``/decode`` too, the
            first that encodes at ``/encode``.
        token: whether clients must send a token.
    """
    pages = {
        "/healthz": ("The gateway's process is alive.", "application/json", "200"),
        "/readyz": ("Every model answered just now; 503 otherwise.", "application/json", "200 503"),
        "/metrics": ("The gateway's Prometheus metrics, and Triton's.", "text/plain", "200"),
        "/info": ("Versions, the models' settings, limits and examples.", "application/json", "200 503"),
        "/docs": ("This document as a page to read.", "text/html", "200"),
        "/openapi.json": ("This document as JSON.", "application/json", "200"),
    }
    paths: dict[str, Any] = {
        path: {
            "get": {
                "summary": summary,
                "responses": {code: {"description": summary, "content": {kind: {}}} for code in codes.split()},
                **({"security": []} if path in ("/healthz", "/readyz") else {}),
            }
        }
        for path, (summary, kind, codes) in pages.items()
    }
    paths["/examples/{name}"] = {
        "get": {
            "summary": "Latents that ship with fluxvae, made for its demo checkpoint; /info names them.",
            "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
            "responses": {"200": {"description": "safetensors", "content": {"application/octet-stream": BINARY}}},
        }
    }
    paths["/"] = {"get": {"summary": "A page for people.", "responses": {"200": {"description": "HTML"}}}}
    for model in models:
        first, operation = (
            (["/encode"], encode_operation(limits, model))
            if encodes(model)
            else (["/", "/decode"], decode_operation(limits, model))
        )
        # Where there are several models, the first of its kind has the short paths.
        for each in (path_of(model), *first):
            paths.setdefault(each, {}).setdefault("post", operation)
    schemes = {"token": {"type": "http", "scheme": "bearer"}, "address": {"type": "http", "scheme": "basic"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fluxvae gateway",
            "version": version,
            "description": "FLUX latents in, the image out, and the other way: the protocols of diffusers' "
            "remote_decode and remote_encode.",
        },
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": {"Error": _ERROR_SCHEMA}, "securitySchemes": schemes if token else {}},
        "security": [{"token": []}, {"address": []}] if token else [],
    }


_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error", "kind", "request_id"],
    "properties": {
        "error": {"type": "string", "description": "What is wrong, what was expected, and what to do."},
        "kind": {"type": "string", "description": "The class of the error."},
        "request_id": {"type": "string", "description": "The request's id, as in X-Request-ID and in the logs."},
    },
}
