"""The model's own numbers on Triton's Prometheus page, beside Triton's ``nv_inference_*``.

Every metric has the label ``model``. Triton (2.51) counts a request that was answered with an error as a success:
``fluxvae_errors_total`` is the count to watch.
"""

from __future__ import annotations

from typing import Any

from fluxvae.engine.memory.free import is_out_of_memory
from fluxvae.engine.plan import Plan
from fluxvae.errors import FluxVAEError

__all__ = ["Metrics", "kind_of", "rung_of"]

_COUNTERS = {
    "fluxvae_decodes_total": "Images decoded.",
    "fluxvae_megapixels_total": "Megapixels decoded.",
    "fluxvae_decode_seconds_total": "Seconds spent decoding, without reading requests and making outputs.",
    "fluxvae_spilled_decodes_total": "Images decoded with feature maps spilled out of memory.",
    "fluxvae_plan_decodes_total": "Images decoded, by the dearest thing their plan did: memory, recompute or spill.",
    "fluxvae_errors_total": "Requests answered with an error, by its kind.",
}
_GAUGES = {
    "fluxvae_in_flight": "Requests that the model has taken from the queue and not answered.",
    "fluxvae_peak_bytes": "Predicted peak of the last decode above the loaded weights, in bytes.",
}


class Metrics:
    """Counters and gauges of one model, shared by its instances.

    Args:
        pb_utils: Triton's module.
        model: the model's name.
    """

    def __init__(self, pb_utils: Any, model: str) -> None:
        family = pb_utils.MetricFamily
        kinds = [(_COUNTERS, family.COUNTER), (_GAUGES, family.GAUGE)]
        # Families must outlive their metrics.
        self._families = {
            name: family(name=name, description=description, kind=kind)
            for descriptions, kind in kinds
            for name, description in descriptions.items()
        }
        self._model = model
        self._metrics: dict[tuple[str, ...], Any] = {}
        # A counter that is not there until something happens looks like a server that does not count.
        for name in ("fluxvae_decodes_total", "fluxvae_megapixels_total", "fluxvae_decode_seconds_total"):
            self._metric(name)
        self._metric("fluxvae_spilled_decodes_total")

    def decoded(self, images: int, pixels: int, seconds: float, plan: Plan | None) -> None:
        """Count one decode of so many images and pixels, with the plan it ran on where the engine plans."""
        self._metric("fluxvae_decodes_total").increment(images)
        self._metric("fluxvae_megapixels_total").increment(pixels / 1e6)
        self._metric("fluxvae_decode_seconds_total").increment(seconds)
        if plan is None:
            return
        self._metric("fluxvae_peak_bytes").set(plan.peak_bytes)
        self._metric("fluxvae_plan_decodes_total", rung=rung_of(plan)).increment(images)
        if plan.spill_bytes:
            self._metric("fluxvae_spilled_decodes_total").increment(images)

    def taken(self, requests: int) -> None:
        """Count requests that have left the queue."""
        self._metric("fluxvae_in_flight").increment(requests)

    def answered(self) -> None:
        """Count one of them as answered."""
        self._metric("fluxvae_in_flight").increment(-1)

    def failed(self, error: BaseException) -> None:
        """Count one request that was answered with ``error``."""
        self._metric("fluxvae_errors_total", kind=kind_of(error)).increment(1)

    def _metric(self, name: str, **labels: str) -> Any:
        key = (name, *labels.values())
        if key not in self._metrics:
            self._metrics[key] = self._families[name].Metric(labels={"model": self._model, **labels})
        return self._metrics[key]


def kind_of(error: BaseException) -> str:
    """The error's class for `FluxVAEError`; others are few, so that labels stay few."""
    if isinstance(error, FluxVAEError):
        return type(error).__name__
    return "OutOfMemory" if is_out_of_memory(error) else "InternalError"


def rung_of(plan: Plan) -> str:
    """The dearest thing a plan does: ``"memory"`` (nothing), ``"recompute"`` or ``"spill"``."""
    if plan.spill_bytes:
        return "spill"
    return "recompute" if plan.work_ratio > 1 else "memory"
