"""The model's own metrics, which Triton shows on its Prometheus page beside its ``nv_inference_*``.

Every metric has the label ``model``. To notice errors, watch ``fluxvae_errors_total``, because Triton (2.51) counts a
request that was answered with an error as a success.
"""

from __future__ import annotations

from typing import Any

from fluxvae.engine.memory.free import is_out_of_memory
from fluxvae.engine.plan import Plan
from fluxvae.errors import FluxVAEError

__all__ = ["Metrics", "kind_of", "rung_of"]

_COUNTERS = {
    "fluxvae_{way}s_total": "Images {way}d.",
    "fluxvae_megapixels_total": "Megapixels decoded or encoded.",
    "fluxvae_{way}_seconds_total": "Seconds spent on the {way}, without reading requests and making outputs.",
    "fluxvae_spilled_{way}s_total": "Images {way}d with feature maps spilled out of memory.",
    "fluxvae_plan_{way}s_total": "Images {way}d, by the dearest thing their plan did: memory, recompute or spill.",
    "fluxvae_errors_total": "Requests answered with an error, by its kind.",
}
_GAUGES = {
    "fluxvae_in_flight": "Requests that the model has taken from the queue and not answered.",
    "fluxvae_peak_bytes": "Predicted peak of the last decode or encode above the loaded weights, in bytes.",
}
"""The metrics; ``{way}`` stands for what the model does: decode or encode."""
_OUR_FAULTS = ("InternalError", "OutOfMemory", "NonFiniteOutputError")
"""The kinds of errors that are no fault of a request. They are on the page from the start, because the rate of a
counter that begins with its first error would not show that error."""


class Metrics:
    """The counters and gauges of one model, which its instances share.

    Args:
        pb_utils: the module ``triton_python_backend_utils``.
        model: the model's name.
        way: ``"decode"`` or ``"encode"``.
    """

    def __init__(self, pb_utils: Any, model: str, way: str) -> None:
        family = pb_utils.MetricFamily
        kinds = [(_COUNTERS, family.COUNTER), (_GAUGES, family.GAUGE)]
        # The families are kept because they must outlive their metrics.
        self._families = {
            name.format(way=way): family(name=name.format(way=way), description=text.format(way=way), kind=kind)
            for descriptions, kind in kinds
            for name, text in descriptions.items()
        }
        self._model = model
        self._way = way
        self._metrics: dict[tuple[str, ...], Any] = {}
        # These appear on the page at once, with 0: a counter that is missing looks as if the server did not count.
        for name in ("{way}s_total", "megapixels_total", "{way}_seconds_total", "spilled_{way}s_total"):
            self._metric(name)
        for kind in _OUR_FAULTS:
            self._metric("errors_total", kind=kind)

    def computed(self, images: int, pixels: int, seconds: float, plan: Plan | None) -> None:
        """Count one decode or encode.

        Args:
            images: how many images it had.
            pixels: how many pixels they have together.
            seconds: how long it took.
            plan: the plan that it followed; None where the engine does not plan.
        """
        self._metric("{way}s_total").increment(images)
        self._metric("megapixels_total").increment(pixels / 1e6)
        self._metric("{way}_seconds_total").increment(seconds)
        if plan is None:
            return
        self._metric("peak_bytes").set(plan.peak_bytes)
        self._metric("plan_{way}s_total", rung=rung_of(plan)).increment(images)
        if plan.spill_bytes:
            self._metric("spilled_{way}s_total").increment(images)

    def taken(self, requests: int) -> None:
        """Count requests that the model has taken from the queue."""
        self._metric("in_flight").increment(requests)

    def answered(self) -> None:
        """Count one of the requests that were taken as answered."""
        self._metric("in_flight").increment(-1)

    def failed(self, error: BaseException) -> None:
        """Count one request that was answered with ``error``."""
        self._metric("errors_total", kind=kind_of(error)).increment(1)

    def _metric(self, name: str, **labels: str) -> Any:
        key = (name, *labels.values())
        if key not in self._metrics:
            family = self._families[f"fluxvae_{name}".format(way=self._way)]
            self._metrics[key] = family.Metric(labels={"model": self._model, **labels})
        return self._metrics[key]


def kind_of(error: BaseException) -> str:
    """Return the label for an error: the class of a `FluxVAEError`. All others share two, so that labels stay few."""
    if isinstance(error, FluxVAEError):
        return type(error).__name__
    return "OutOfMemory" if is_out_of_memory(error) else "InternalError"


def rung_of(plan: Plan) -> str:
    """Return the dearest thing that a plan does to save memory: ``"spill"``, ``"recompute"``, or none: ``"memory"``."""
    if plan.spill_bytes:
        return "spill"
    return "recompute" if plan.work_ratio > 1 else "memory"
