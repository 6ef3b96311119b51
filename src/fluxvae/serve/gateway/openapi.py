"""Makes the gateway's OpenAPI document from the table of parameters by which requests are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxvae.serve.gateway.decode import decode_path
from fluxvae.serve.gateway.remote_decode import PARAMETERS, Limits
from fluxvae.serve.models import MODEL, vae_class_of

__all__ = ["document"]

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_ERRORS = {
    "400": "The request, the latents or the size are wrong; the message says what to do.",
    "401": "The request has no token, or a wrong one.",
    "408": "The body did not arrive in time.",
    "413": "The request has more bytes or asks for more pixels than this gateway takes.",
    "415": "The body is of another type, or compressed.",
    "500": "The decode failed inside the server, whose log has the details.",
    "502": "Triton does not serve the model.",
    "503": "Triton is not there, or it or this gateway has too much to do: try again.",
    "504": "The image was not ready in time.",
}


def document(limits: Limits, version: str, *, models: Sequence[str] = (MODEL,), token: bool) -> dict[str, Any]:
    """Make the OpenAPI document, a dictionary for JSON.

    Args:
        limits: what a request may ask for.
        version: the version of fluxvae.
        models: the names of the models that are served; the first is served at ``/`` and ``/decode`` too.
        token: whether clients must send a token.
    """
    pages = {
        "/healthz": ("The gateway's process is alive.", "application/json", "200"),
        "/readyz": ("A decode through Triton was answered just now; 503 otherwise.", "application/json", "200 503"),
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
            "responses": {"200": {"description": "safetensors", "content": {"application/octet-stream": _BINARY}}},
        }
    }
    paths["/"] = {
        "get": {"summary": "A page for people.", "responses": {"200": {"description": "HTML"}}},
        "post": _decode(limits, models[0]),
    }
    paths["/decode"] = {"post": _decode(limits, models[0])}
    for model in models:
        paths[decode_path(model)] = {"post": _decode(limits, model)}
    schemes = {"token": {"type": "http", "scheme": "bearer"}, "address": {"type": "http", "scheme": "basic"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fluxvae gateway",
            "version": version,
            "description": "FLUX latents in, the image out: the protocol of diffusers' remote_decode.",
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


_TAKES = {
    "AutoencoderKL": "latents of FLUX.1 and its borrowers, packed with 64 features",
    "AutoencoderKLFlux2": "latents of FLUX.2, packed row by row with 128 features",
    "AutoencoderTiny": "an approximate preview; packed latents with the features of its model",
}


_BASE64 = {"type": "string", "contentEncoding": "base64"}
_JSON_BODY: dict[str, Any] = {
    "schema": {
        "type": "object",
        "required": ["inputs"],
        "additionalProperties": False,
        "properties": {
            "inputs": {**_BASE64, "description": "The latents' raw little-endian bytes."},
            "parameters": {
                "type": "object",
                "description": "The parameters that the query string does not have, by the same names.",
            },
        },
    }
}
_JSON_TENSOR: dict[str, Any] = {
    "type": "object",
    "required": ["inputs", "parameters"],
    "properties": {
        "inputs": {**_BASE64, "description": "The tensor's raw little-endian bytes."},
        "parameters": {
            "type": "object",
            "properties": {"shape": {"type": "array", "items": {"type": "integer"}}, "dtype": {"type": "string"}},
        },
    },
}


def _decode(limits: Limits, model: str) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "query",
            "required": parameter.required,
            "description": parameter.description,
            "schema": parameter.schema,
            **({"style": "form", "explode": True} if parameter.schema.get("type") == "array" else {}),
        }
        for name, parameter in PARAMETERS.items()
    ]
    for name, description in (
        (
            "Accept",
            "With output_type=pil, tensor/binary asks for a tensor in [0, 1] in place of an encoded picture. "
            "tensor/base64 asks for tensors as JSON.",
        ),
        (
            "X-Request-ID",
            "An id of 1 to 128 visible ASCII characters, which comes back with the answer and is in every log. Where "
            "it is left out, one is made.",
        ),
    ):
        parameters.append({"name": name, "in": "header", "description": description, "schema": {"type": "string"}})
    json_error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "summary": f"Decode latents with {model} ({_TAKES[vae_class_of(model)]}): diffusers' remote_decode.",
        "description": f"The body is the latents' raw little-endian bytes, exactly as many as shape and dtype say and "
        f"at most {limits.max_request_bytes}, or JSON with these bytes in base64. All images of a request may have at "
        f"most {limits.max_pixels} pixels together.",
        "parameters": parameters,
        "requestBody": {
            "required": True,
            "content": {
                "tensor/binary": _BINARY,
                "application/octet-stream": _BINARY,
                "tensor/base64": _JSON_BODY,
                "application/json": _JSON_BODY,
            },
        },
        "responses": {
            "200": {
                "description": "The image. A tensor's shape and dtype are in the headers.",
                "headers": {
                    "shape": {
                        "description": "The shape of a tensor, as a JSON list; pictures have none.",
                        "schema": {"type": "string"},
                    },
                    "dtype": {
                        "description": "The dtype of a tensor, float32 or uint8; pictures have none.",
                        "schema": {"type": "string"},
                    },
                    "X-Request-ID": {"schema": {"type": "string"}},
                    "Server-Timing": {
                        "description": "How many milliseconds each phase of the request took.",
                        "schema": {"type": "string"},
                    },
                    "X-Fluxvae-Warning": {
                        "description": "Says that the size was floored, or that the image is an approximate preview.",
                        "schema": {"type": "string"},
                    },
                },
                "content": {
                    "tensor/binary": _BINARY,
                    "tensor/base64": {"schema": _JSON_TENSOR},
                    "image/jpeg": _BINARY,
                    "image/png": _BINARY,
                },
            },
            **{code: {"description": text, "content": json_error} for code, text in _ERRORS.items()},
        },
    }
