"""Decides whether a health check's tiny request needs a decode, or can be answered with the result of an earlier one.

`fluxvae serve` and the gateway ask every few seconds whether decodes are answered, by requests with the parameter
``probe``. With FLUX's full VAE on a CPU, even the smallest decode takes a quarter of a second of a core, because the
weights are prepared anew for each decode. So where the model has decoded anything within the last five minutes, it need
not prove again that it can. Such an answer still shows that Triton, the way to the model's process and that process are
alive. After a decode that failed for a reason of its own, nothing is taken for granted: the next probe is answered by a
decode, or by its error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fluxvae.errors import FluxVAEError
from fluxvae.serve.model.requests import Job

__all__ = ["Proof"]


class Proof:
    """What is known of the model's last decodes.

    It reads no clock: the caller passes the time, in seconds.

    Args:
        lasts_s: for how many seconds a decode proves that the model can decode.
    """

    def __init__(self, lasts_s: float = 300.0) -> None:
        self._lasts_s = lasts_s
        self._decoded: float | None = None
        self._question: tuple[int, int, int] | None = None
        self._answer: torch.Tensor | None = None

    def answer(self, job: Job, now: float) -> torch.Tensor | None:
        """Return the image (B, 3, H, W) that answers a job; None where it has to be decoded, or the job is no probe."""
        if not job.parameters.probe or self._decoded is None or now - self._decoded > self._lasts_s:
            return None
        return self._answer if self._question == _size(job) else None

    def decoded(self, jobs: Sequence[Job], image: torch.Tensor, now: float) -> None:
        """Note that these jobs were decoded, and to which image. That of a probe is kept for the next ones."""
        self._decoded = now
        if len(jobs) == 1 and jobs[0].parameters.probe:
            self._question, self._answer = _size(jobs[0]), image

    def failed(self, error: Exception) -> None:
        """Note that a decode failed. Only an unexpected error is a reason to doubt that the model can decode others."""
        if not isinstance(error, FluxVAEError):  # which is about the request, its memory, or a client that has left
            self._decoded = None


def _size(job: Job) -> tuple[int, int, int]:
    return (job.request.batch, job.request.height, job.request.width)
