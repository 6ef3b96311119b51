"""What a job will do, what became of it, and who is told meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from fluxvae.batch.items import Failure, Item, Result
from fluxvae.engine.way import DECODE, Way

__all__ = ["FAILURES", "Outlook", "Report", "Watcher"]

FAILURES = "failures.jsonl"
"""The file in the output folder that lists what failed."""


@dataclass(frozen=True)
class Outlook:
    """What a job will do, as far as it is known before the first decode."""

    items: tuple[Item, ...]
    """The items that are still to be done: images to decode, or pictures to encode."""
    present: int
    """How many results are there already and will be left alone."""
    failures: tuple[Failure, ...]
    """The files and items with which it cannot be done, as the inputs' headers already show."""
    floored: int
    """How many images have a height or width that was floored to a multiple of 16."""
    approximate: bool
    """Whether the checkpoint is a preview's, so that the results will not be those of the full VAE."""
    skipped: int = 0
    """How many files are known to hold no latents, such as a text encoder's cache."""

    @property
    def pixels(self) -> int:
        """The number of pixels of the items that are still to be done."""
        return sum(item.pixels for item in self.items)

    def sizes(self) -> dict[tuple[int, int], int]:
        """Return how many of the images have each (height, width) in pixels, the most frequent size first."""
        counts: dict[tuple[int, int], int] = {}
        for item in self.items:
            counts[item.size] = counts.get(item.size, 0) + 1
        return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


@dataclass
class Report:
    """What became of a job."""

    out: str
    """The path or URL of the output folder."""
    way: Way = DECODE
    """Whether the job decoded or encoded."""
    done: int = 0
    """How many images, or latents, this run wrote."""
    present: int = 0
    """How many were there already and were left alone."""
    failures: list[Failure] = field(default_factory=list)
    """The files and items that gave no result because something was wrong with them, each with the reason."""
    skipped: int = 0
    """How many files are known to hold no latents, as `Outlook.skipped`."""
    left: int = 0
    """How many items are still to be done, because the job was stopped."""
    pixels: int = 0
    """The number of pixels of the items that this run did."""
    seconds: float = 0.0
    """How long reading, computing and writing took together; looking through the inputs before is not counted."""
    idle_share: float | None = None
    """The share of its time, from 0 to 1, that the decoder or encoder waited for reading and writing. None: nothing was
    done, or it was not measured, as on a Ray cluster."""
    approximate: bool = False
    """Whether the checkpoint is a preview's, as `Outlook.approximate`."""
    log_problem: str | None = None
    """Why failures.jsonl could not be written; None where it could."""

    @property
    def decoded(self) -> int:
        """How many images a job of decoding wrote."""
        return self.done

    @property
    def encoded(self) -> int:
        """How many pictures a job of encoding wrote latents of."""
        return self.done

    @property
    def stopped(self) -> bool:
        """Whether the job was stopped before its end."""
        return self.left > 0

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON. ``failures`` names the file that lists them; it is None where there is none."""
        rate = 1 / self.seconds if self.seconds else 0.0
        return {
            "out": self.out,
            f"{self.way.name}d": self.done,
            "present": self.present,
            "failed": len(self.failures),
            "skipped": self.skipped,
            "left": self.left,
            "seconds": self.seconds,
            "images_per_second": self.done * rate,
            "megapixels_per_second": self.pixels / 1e6 * rate,
            "idle_share": self.idle_share,
            "approximate": self.approximate,
            "failures": FAILURES if self.failures and not self.log_problem else None,
        }


class Watcher(Protocol):
    """Is told how a job goes on, for instance to show its progress."""

    def begin(self, outlook: Outlook) -> None:
        """Is called once, before the first item is computed, with what the job will do."""

    def result(self, result: Result) -> None:
        """Is called for every item, as soon as it is known what became of it."""
