"""Describes the two operations of the OpenAPI document, decoding and encoding, from the tables of parameters by which
requests are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxvae.serve.gateway import remote_decode, remote_encode
from fluxvae.serve.gateway.query import Limits, Parameter
from fluxvae.serve.models import vae_class_of

__all__ = ["BINARY", "decode_operation", "encode_operation"]

BINARY = {"schema": {"type": "string", "format": "binary"}}
_TEXT = {"schema": {"type": "string"}}
_ERRORS = {
    "400": "The request, its size or what it holds are wrong; the message says what to do.",
    "401": "The request has no token, or a wrong one.",
    "403": "A web page of another origin sent it.",
    "408": "The body did not arrive in time.",
    "413": "The request has more bytes or asks for more pixels than this gateway takes.",
    "415": "The body is of another type, or compressed.",
    "500": "It failed inside the server, whose log has the details.",
    "502": "Triton does not serve the model.",
    "503": "Triton is not there, or it or this gateway has too much to do: try again.",
    "504": "The answer was not ready in time.",
}


_TAKES = {
    "AutoencoderKL": "latents of FLUX.1 and its borrowers, packed with 64 features",
    "AutoencoderKLFlux2": "latents of FLUX.2, packed row by row with 128 features",
    "AutoencoderKLQwenImage": "latents of Qwen-Image and its borrowers, packed with 64 features",
    "AutoencoderTiny": "an approximate preview; packed latents with the features of its model",
}
_GIVES = {
    "AutoencoderKL": "latents of FLUX.1 and its borrowers",
    "AutoencoderKLFlux2": "latents of FLUX.2",
    "AutoencoderKLQwenImage": "latents of Qwen-Image and its borrowers",
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


def decode_operation(limits: Limits, model: str) -> dict[str, Any]:
    """Describe how latents are decoded with this model."""
    headers = {
        "Accept": "With output_type=pil, tensor/binary asks for a tensor in [0, 1] in place of an encoded picture. "
        "tensor/base64 asks for tensors as JSON.",
    }
    return {
        "summary": f"Decode latents with {model} ({_TAKES[vae_class_of(model)]}): diffusers' remote_decode.",
        "description": f"The body is the latents' raw little-endian bytes, exactly as many as shape and dtype say and "
        f"at most {limits.max_request_bytes}, or JSON with these bytes in base64. All images of a request may have at "
        f"most {limits.max_pixels} pixels together.",
        "parameters": _parameters(remote_decode.PARAMETERS, headers),
        "requestBody": {
            "required": True,
            "content": {
                "tensor/binary": BINARY,
                "application/octet-stream": BINARY,
                "tensor/base64": _JSON_BODY,
                "application/json": _JSON_BODY,
            },
        },
        "responses": _responses(
            "The image. A tensor's shape and dtype are in the headers.",
            {
                "tensor/binary": BINARY,
                "tensor/base64": {"schema": _JSON_TENSOR},
                "image/jpeg": BINARY,
                "image/png": BINARY,
            },
            shape="The shape of a tensor, as a JSON list; pictures have none.",
            dtype="The dtype of a tensor, float32 or uint8; pictures have none.",
            warning="Says that the size was floored, or that the image is an approximate preview.",
        ),
    }


def encode_operation(limits: Limits, model: str) -> dict[str, Any]:
    """Describe how pictures are encoded with this model."""
    return {
        "summary": f"Encode a picture with {model} to {_GIVES[vae_class_of(model)]}: diffusers' remote_encode.",
        "description": "The body is a picture file (PNG, JPEG, WebP and others) or a tensor's raw little-endian bytes, "
        f"exactly as many as shape and dtype say: at most {limits.max_picture_bytes} bytes and {limits.max_pixels} "
        "pixels. It may come without a Content-Type, as diffusers' client sends it; then a file's pixels are "
        "taken as they lie. With a type, a photograph is turned upright and its colour profile is applied.",
        "parameters": _parameters(remote_encode.PARAMETERS, {}),
        "requestBody": {
            "required": True,
            "content": {"image/*": BINARY, "tensor/binary": BINARY, "application/octet-stream": BINARY},
        },
        "responses": _responses(
            "The latents (batch, channels, height/8, width/8); FLUX.2's, where they are scaled, "
            "(batch, 128, height/16, width/16). Shape and dtype are in the headers.",
            {"tensor/binary": BINARY},
            shape="The shape, as a JSON list.",
            dtype="The dtype, float32.",
            warning="Says how the values of a tensor were read, where the request left it open.",
        ),
    }


def _parameters(table: Mapping[str, Parameter], headers: Mapping[str, str]) -> list[dict[str, Any]]:
    described: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "query",
            "required": parameter.required,
            "description": parameter.description,
            "schema": parameter.schema,
            **({"style": "form", "explode": True} if parameter.schema.get("type") == "array" else {}),
        }
        for name, parameter in table.items()
    ]
    request_id = (
        "An id of 1 to 128 visible ASCII characters, which comes back with the answer and is in every log. Where it is "
        "left out, one is made."
    )
    for name, description in {**headers, "X-Request-ID": request_id}.items():
        described.append({"name": name, "in": "header", "description": description, **_TEXT})
    return described


def _responses(description: str, content: dict[str, Any], *, shape: str, dtype: str, warning: str) -> dict[str, Any]:
    headers = {
        "shape": {"description": shape, **_TEXT},
        "dtype": {"description": dtype, **_TEXT},
        "X-Request-ID": _TEXT,
        "Server-Timing": {"description": "How many milliseconds each phase of the request took.", **_TEXT},
        "X-Fluxvae-Warning": {"description": warning, **_TEXT},
    }
    json_error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    errors = {code: {"description": text, "content": json_error} for code, text in _ERRORS.items()}
    return {"200": {"description": description, "headers": headers, "content": content}, **errors}
