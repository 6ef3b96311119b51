"""When a watcher's tiny question needs a decode to be answered, and when the last one still stands for it.

`fluxvae serve` and the gateway ask every few seconds whether decodes are answered. At FLUX's full widths on a CPU the
smallest decode takes a quarter of a second of a core, because the weights are prepared anew for each decode. What has
decoded within the last five minutes, for anybody, is not made to prove it again: the question then still shows that
Triton, the way to the model's process and that process are alive. After a decode that failed of itself nothing is taken
for granted: the next question is answered by a decode, or by its error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fluxvae.errors import FluxVAEError
from fluxvae.serve.model.requests import Job

__all__ = ["Proof"]


class Proof:
    """What is known of the model's last decodes. It knows no clock: the time is told to it, in seconds.

    Args:
        lasts_s: how long a decode proves that others would be answered.
    """

    def __init__(self, lasts_s: float = 300.0) -> None:
        self._lasts_s = lasts_s
        self._decoded: float | None = None
        self._question: tuple[int, int, int] | None = None
        self._answer: torch.Tensor | None = None

    def answer(self, job: Job, now: float) -> torch.Tensor | None:
        """The image for a watcher's question, (B, 3, H, W), where none has to be decoded for it."""
        if not job.parameters.probe or self._decoded is None or now - self._decoded > self._lasts_s:
            return None
        return self._answer if self._question == _size(job) else None

    def decoded(self, jobs: Sequence[Job], image: torch.Tensor, now: float) -> None:
        """These were decoded to ``image``."""
        self._decoded = now
        if len(jobs) == 1 and jobs[0].parameters.probe:
            self._question, self._answer = _size(jobs[0]), image

    def failed(self, error: Exception) -> None:
        """A decode failed; what it says about others depends on why."""
        if not isinstance(error, FluxVAEError):  # those are about the request, its memory or who left
            self._decoded = None


def _size(job: Job) -> tuple[int, int, int]:
    return (job.request.batch, job.request.height, job.request.width)
