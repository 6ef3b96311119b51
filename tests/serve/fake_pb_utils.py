"""``triton_python_backend_utils`` without Triton: enough of it for the model, and it enforces what Triton would."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
import torch


class TritonModelException(Exception):
    pass


class TritonError:
    INTERNAL = 1
    INVALID_ARG = 3
    UNAVAILABLE = 4
    CANCELLED = 7

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray), type(array)
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array

    def to_dlpack(self) -> Any:
        return torch.from_numpy(self._array).__dlpack__()

    @staticmethod
    def from_dlpack(name: str, tensor: torch.Tensor) -> Tensor:
        return Tensor(name, tensor.numpy())


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        assert (output_tensors is None) != (error is None)
        assert error is None or isinstance(error, TritonError)
        self._tensors, self._error = output_tensors or [], error

    def outputs(self) -> dict[str, np.ndarray]:
        assert self._error is None, self._error.message()
        return {tensor.name(): tensor.as_numpy() for tensor in self._tensors}

    def error(self) -> TritonError:
        assert self._error is not None
        return self._error


TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class ResponseSender:
    """Stands for Triton's response sender. It takes exactly one response, the final one."""

    full: ClassVar[bool] = False
    """Whether there is no room for responses in shared memory."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.counted = 0

    def send(self, response: InferenceResponse, flags: int) -> None:
        assert flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL
        assert isinstance(response, InferenceResponse)
        assert not self.counted, "answered twice"
        self.counted += 1  # Triton too counts a response before it makes room for it
        if self.full:
            raise TritonModelException("Failed to increase the shared memory pool size")
        self.responses.append(response)


class InferenceRequest:
    """A request as ``execute`` gets it. All rows of its latents have the same ``height`` and ``width``."""

    def __init__(
        self,
        latents: np.ndarray,
        height: int,
        width: int,
        outputs: tuple[str, ...] = ("images",),
        *,
        cancelled: bool = False,
        request_id: str = "",
        **parameters: object,
    ) -> None:
        rows = (len(latents), 1)
        self.inputs = {
            "latents": Tensor("latents", latents),
            "height": Tensor("height", np.full(rows, height, np.int32)),
            "width": Tensor("width", np.full(rows, width, np.int32)),
        }
        self._outputs, self._parameters, self._cancelled = set(outputs), parameters, cancelled
        self._id, self.sender = request_id, ResponseSender()

    def requested_output_names(self) -> set[str]:
        return self._outputs

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def is_cancelled(self) -> bool:
        return self._cancelled

    def request_id(self) -> str:
        return self._id

    def get_response_sender(self) -> ResponseSender:
        return self.sender


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request.inputs.get(name)


class Logger:
    lines: ClassVar[list[str]] = []

    @classmethod
    def log_info(cls, message: str) -> None:
        cls.lines.append(message)

    log_error = log_verbose = log_info


class MetricFamily:
    """Stands for Triton's metrics. ``values`` holds what the metrics page would show."""

    COUNTER, GAUGE = "counter", "gauge"
    values: ClassVar[dict[tuple[str, ...], float]] = {}

    def __init__(self, *, name: str, description: str, kind: str) -> None:
        assert description
        assert name.endswith("_total") == (kind == self.COUNTER)
        self._name, self._kind = name, kind

    def Metric(self, *, labels: dict[str, str]) -> Metric:
        return Metric(self._name, self._kind, labels)


class Metric:
    def __init__(self, name: str, kind: str, labels: dict[str, str]) -> None:
        self._key, self._kind = (name, *labels.values()), kind
        MetricFamily.values.setdefault(self._key, 0)

    def increment(self, value: float) -> None:
        assert self._kind == MetricFamily.GAUGE or value >= 0
        MetricFamily.values[self._key] += value

    def set(self, value: float) -> None:
        assert self._kind == MetricFamily.GAUGE
        MetricFamily.values[self._key] = value
