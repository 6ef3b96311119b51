"""Tells whether the models answer, for ``/readyz``."""

from __future__ import annotations

import asyncio
import contextlib
import time

from fluxvae.errors import DeadlineExceededError, FluxVAEError
from fluxvae.serve.gateway.forward import TritonModel

__all__ = ["Readiness"]


class Readiness:
    """Tells whether a model answers, by the last request that it answered or by a probe.

    Everyone who asks while a probe is under way gets the answer of that probe.

    Args:
        model: the model.
        age_s: for how many seconds a request that was answered is proof enough.
        timeout_s: how many seconds a probe may take.
    """

    def __init__(self, model: TritonModel, *, age_s: float = 3.0, timeout_s: float = 5.0) -> None:
        self._model = model
        self._age_s = age_s
        self._timeout_s = timeout_s
        self._probe: asyncio.Task[str | None] | None = None

    async def reason_against(self) -> str | None:
        """Return None where the model answers, otherwise why it does not."""
        last = self._model.last_success
        if last is not None and time.monotonic() - last <= self._age_s and await self._model.alive():
            return None
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._ask())
        return await asyncio.shield(self._probe)  # so that one who leaves does not end the probe for the others

    async def close(self) -> None:
        """End the probe that is under way, if there is one."""
        if self._probe is not None:
            self._probe.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probe

    async def _ask(self) -> str | None:
        try:
            await self._model.probe(self._timeout_s)
        except DeadlineExceededError:
            asked = "an encode" if self._model.encodes else "a decode"
            return f"{asked} of 16x16 pixels was not answered within {self._timeout_s:g} s"
        except FluxVAEError as error:
            return str(error)
        return None
