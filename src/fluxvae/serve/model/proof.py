"""Decides whether a health check's tiny request needs work, or can be answered with the result of an earlier one.

`fluxvae serve` and the gateway ask every few seconds whether requests are answered, by tiny ones with the parameter
``probe``. What follows is about decodes, and holds for encodes in the same way. With FLUX's full VAE on a CPU, even the
smallest decode takes a quarter of a second of a core, because the weights are prepared anew for each decode. So where
the model has decoded anything within the last five minutes, it need not prove again that it can. Such an answer still
shows that Triton, the way to the model's process and that process are alive. After a decode that failed for a reason of
its own, nothing is taken for granted: the next probe is answered by a decode, or by its error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fluxvae.errors import FluxVAEError
from fluxvae.serve.model.jobs import AnyJob

__all__ = ["Proof"]


class Proof:
    """What is known of the model's last decodes or encodes.

    It reads no clock: the caller passes the time, in seconds.

    Args:
        lasts_s: for how many seconds one that succeeded proves that the model can do it.
    """

    def __init__(self, lasts_s: float = 300.0) -> None:
        self._lasts_s = lasts_s
        self._computed: float | None = None
        self._question: tuple[int, int, int] | None = None
        self._answer: torch.Tensor | None = None

    def answer(self, job: AnyJob, now: float) -> torch.Tensor | None:
        """Return the result that answers a job; None where it has to be computed, or the job is no probe."""
        if not job.parameters.probe or self._computed is None or now - self._computed > self._lasts_s:
            return None
        return self._answer if self._question == _size(job) else None

    def computed(self, jobs: Sequence[AnyJob], result: torch.Tensor, now: float) -> None:
        """Note that these jobs were computed, and to what. The result of a probe is kept for the next ones."""
        self._computed = now
        if len(jobs) == 1 and jobs[0].parameters.probe:
            self._question, self._answer = _size(jobs[0]), result

    def failed(self, error: Exception) -> None:
        """Note that one failed. Only an unexpected error is a reason to doubt that the model can compute others."""
        if not isinstance(error, FluxVAEError):  # which is about the request, its memory, or a client that has left
            self._computed = None


def _size(job: AnyJob) -> tuple[int, int, int]:
    return (job.request.batch, job.request.height, job.request.width)
