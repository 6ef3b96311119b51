"""Sends requests over gRPC with their tensors in system shared memory, to a server on the same machine."""

from __future__ import annotations

import contextlib
import threading
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from fluxvae.errors import FluxVAEError, InvalidOptionError, UnavailableError
from fluxvae.serve.client.transports import TYPES, Call, Grpc
from fluxvae.serve.client.wire import Request, Unsent

__all__ = ["SharedMemoryGrpc"]


class SharedMemoryGrpc(Grpc):
    """Carries requests over gRPC, with their tensors and those of the answers in system shared memory, on one machine.

    That saves time with large images. Each request that is on its way has a region of its own, which later requests use
    again. A region whose request ended without an answer is not used again, and stays registered with the server, which
    may still read or write it. This process gives its memory back in ``close``, and the server when it ends.

    The server must allow this: ``fluxvae serve --allow-client-shm``. It should do so only among clients that trust each
    other, because Triton before 25.07 guards its memory badly against those that may name regions (SECURITY.md).

    Args:
        url: the ``host:port`` of Triton's gRPC endpoint.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._lock = threading.Lock()
        self._idle: list[SharedMemory] = []
        self._all: list[SharedMemory] = []

    def start(self, request: Request, timeout_s: float) -> Call:
        """Send a request; see `Transport.start`."""
        sent = sum(array.nbytes for array in request.inputs.values())
        region = self._lease(sent + request.answer_bytes, request, timeout_s)
        inputs, offset = [], 0
        for name, array in request.inputs.items():
            np.ndarray(array.shape, array.dtype, region.buf, offset)[...] = array
            inputs.append(triton.InferInput(name, list(array.shape), TYPES[array.dtype.name]))
            inputs[-1].set_shared_memory(region.name, array.nbytes, offset)
            offset += array.nbytes
        output = triton.InferRequestedOutput(request.output)
        output.set_shared_memory(region.name, request.answer_bytes, sent)

        def array_of(result: Any) -> NDArray[Any]:
            shape = tuple(result.get_output(request.output).shape)
            return np.ndarray(shape, request.answer_dtype, region.buf, sent)

        return self._send(
            request, timeout_s, inputs, output, array_of, lambda answered: self._give_back(region, answered)
        )

    def close(self) -> None:
        """Take the idle regions back from the server, free the memory of all of them, and close the connection."""
        with self._lock:
            regions, idle, self._all, self._idle = self._all, self._idle, [], []
        for region in regions:
            if region in idle:
                with contextlib.suppress(InferenceServerException):  # where the server has ended, so have its mappings
                    self._client.unregister_system_shared_memory(region.name, client_timeout=5)
            _free(region)
        super().close()

    def _lease(self, nbytes: int, request: Request, timeout_s: float) -> SharedMemory:
        """Return a region of at least ``nbytes`` bytes: the smallest idle one that suffices, or else a new one."""
        with self._lock:
            large_enough = [region for region in self._idle if region.size >= nbytes]
            if large_enough:
                region = min(large_enough, key=lambda one: one.size)
                self._idle.remove(region)
                return region
        region = SharedMemory(create=True, size=1 << max(16, (nbytes - 1).bit_length()))
        try:
            self._client.register_system_shared_memory(
                region.name, f"/{region.name}", region.size, client_timeout=timeout_s
            )
        except InferenceServerException as error:
            _free(region)
            if "restricted" in (error.message() or ""):
                raise InvalidOptionError(
                    "protocol: got 'shared_memory', but this server has shared memory of clients switched off; start "
                    "it with fluxvae serve --allow-client-shm (TritonServer(open_apis=['shared-memory'])), or leave "
                    "protocol out: gRPC then carries the tensors"
                ) from error
            translated = super()._translate(error, request, timeout_s)
            if isinstance(translated, UnavailableError):
                raise translated from error
            raise FluxVAEError(
                f"protocol: shared_memory: the server does not take a region: {error.message()}; is it on this "
                "machine, and does it allow it (--allow-client-shm=true from Triton 26.05)?"
            ) from error
        with self._lock:
            self._all.append(region)
        return region

    def _translate(self, error: InferenceServerException, request: Request, timeout_s: float) -> FluxVAEError:
        if "shared memory region" not in (error.message() or ""):
            return super()._translate(error, request, timeout_s)
        with self._lock:  # the server was restarted, so it knows none of the idle regions either
            forgotten, self._idle = self._idle, []
            self._all = [region for region in self._all if region not in forgotten]
        for region in forgotten:
            _free(region)
        return Unsent(f"the server knows no shared memory of ours: {error.message()}")

    def _give_back(self, region: SharedMemory, answered: bool) -> None:
        with self._lock:
            if answered and region in self._all:
                self._idle.append(region)


def _free(region: SharedMemory) -> None:
    region.unlink()
    with contextlib.suppress(BufferError):  # an answer in it is being read, and the last view of it frees the memory
        region.close()
