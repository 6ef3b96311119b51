"""The parts of a run, the most telling first. This module imports neither PyTorch nor a part.

A part is a function that takes a `bench.Bench`. It runs in a child process, which the supervisor ends when the part has
taken longer than it may; the parts after it then run in a new one. Parts that follow each other share a process, since
to import PyTorch and make a CUDA context takes seconds. Those that measure a whole card begin with a fresh one.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PARTS", "SANITIZE", "Part", "named"]


class Part(NamedTuple):
    """One part of a run."""

    name: str
    function: str
    """Where it is, as ``"module.function"`` within this package."""
    needs: float
    """The seconds that must be left for it to be begun."""
    most: float
    """The seconds after which it is ended."""
    arguments: tuple[int | str, ...] = ()
    fresh: bool = False
    """It begins with a process of its own."""


PARTS = (
    Part("machine", "checks.machine", 3, 60),
    Part("smoke", "checks.smoke", 20, 120),
    Part("decodes 1024", "decodes.one_size", 20, 90, (1024,)),
    Part("sglang 1024", "peers.sglang", 6, 60, ("flux", 1024)),
    Part("compiled 1024", "peers.compiled", 25, 90, ("default", 1024)),
    Part("pytest", "checks.gpu_tests", 30, 120),
    Part("decodes 2048", "decodes.one_size", 15, 60, (2048,)),
    Part("sglang 2048", "peers.sglang", 8, 40, ("flux", 2048)),
    Part("decodes 4096", "decodes.largest", 15, 60),
    Part("profile", "profiling.profile", 15, 60),
    Part("pipeline", "pipeline.installed", 20, 60, (), True),
    Part("fragmentation", "pipeline.fragmentation", 6, 40),
    Part("FLUX.2", "peers.flux2", 15, 60),
    Part("graphs", "decodes.graphs", 8, 40),
    Part("rates", "hardware.rates_and_floor", 5, 30),
    Part("compiled 2048", "peers.compiled", 30, 90, ("default", 2048)),
    Part("attention", "hardware.attention", 12, 60),
    Part("convolutions", "hardware.convolutions", 12, 60),
    Part("passes", "hardware.passes", 6, 40),
    Part("blocks", "decodes.blocks", 12, 40),
    Part("batches", "decodes.batches", 8, 40),
    Part("float32", "decodes.float32", 12, 60),
    Part("decodes 512", "decodes.one_size", 8, 40, (512,)),
    Part("tiled", "peers.tiled", 5, 40),
    Part("compiled without graphs", "peers.compiled", 60, 150, ("max-autotune-no-cudagraphs", 1024), True),
    Part("compiled at most", "peers.compiled", 60, 150, ("max-autotune", 1024)),
)
SANITIZE = (Part("machine", "checks.machine", 3, 60), Part("sanitizer", "checks.sanitizer", 60, 230))
"""What ``--sanitize`` runs: compute-sanitizer makes every launch slow, so it has a run of its own."""


def named(names: list[str], parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The parts of these names, in their own order; all where no name is given.

    Raises:
        ValueError: there is no part of a name.
    """
    unknown = sorted(set(names) - {part.name for part in parts})
    if unknown:
        raise ValueError(
            f"got {', '.join(map(repr, unknown))}, expected {', '.join(repr(part.name) for part in parts)}"
        )
    return tuple(part for part in parts if not names or part.name in names)
