"""What ``fluxvae decode`` and ``fluxvae encode`` show: progress, the outlook of a dry run, a report at the end."""

from __future__ import annotations

import os
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fluxvae.batch import Outlook, Report, Result
from fluxvae.batch.estimate import Estimate
from fluxvae.batch.outlook import FAILURES
from fluxvae.cli.options import DEMO_NOTE, print_facts
from fluxvae.engine.plan import size_in_words
from fluxvae.engine.way import DECODE, Way
from fluxvae.latents.format import PREVIEW_LATENTS_NOTE, PREVIEW_NOTE

__all__ = ["ProgressView", "print_failures", "print_outlook", "print_report"]

_FAILURES_SHOWN = 8
_SHORT_S = 2.0
"""A job that ends within so many seconds writes no lines about its progress into a pipe."""


class ProgressView:
    """Shows a job's progress: on a terminal a bar with rate and time left, in a pipe a line for each tenth of the job.

    With ``quiet`` it shows nothing.
    """

    def __init__(self, way: Way = DECODE, *, quiet: bool = False) -> None:
        self._way = way
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self._console,
            expand=True,
            speed_estimate_period=60,
        )
        self._task = self._bar.add_task(way.doing, total=None, rate="", start=False)
        self._total = self._done = self._pixels = self._failed = 0
        self._start = time.perf_counter()

    def begin(self, outlook: Outlook) -> None:
        """Say what was found, and start the bar."""
        self._total, self._start = len(outlook.items), time.perf_counter()
        if outlook.present:
            self._console.print(f"{outlook.present} {_things(self._way)} are there already")
        if outlook.approximate:
            note = f"every image is an {PREVIEW_NOTE}" if self._way == DECODE else PREVIEW_LATENTS_NOTE
            self._console.print(f"[yellow]{note}[/yellow]")
        if outlook.skipped:
            self._console.print(skipped_in_words(outlook.skipped), soft_wrap=True)
        if outlook.floored:
            self._console.print(f"{outlook.floored} sizes are no multiples of 16: floored, as FluxPipeline does")
        if self._total and self._console.is_terminal:
            self._bar.start()
            self._bar.update(self._task, total=self._total)
            self._bar.start_task(self._task)

    def result(self, result: Result) -> None:
        """Count one item, and move the bar on."""
        self._done += 1
        if result.failure is None:
            self._pixels += result.item.pixels
        else:
            self._failed += 1
        seconds = time.perf_counter() - self._start
        failed = f", [red]{self._failed} failed[/red]" if self._failed else ""
        rate = f"{self._done / seconds:.1f} images/s, {self._pixels / 1e6 / seconds:.2f} MP/s{failed},"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._done, rate=rate)
        elif seconds > _SHORT_S and self._done < self._total and self._tenth(self._done) > self._tenth(self._done - 1):
            left = seconds / self._done * (self._total - self._done)
            self._console.print(f"{self._done}/{self._total} {rate} {time_in_words(left)} left", soft_wrap=True)

    def _tenth(self, done: int) -> int:
        return done * 10 // self._total

    def __enter__(self) -> ProgressView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:  # in a pipe the bar never began, and ending it would print an empty line
            self._bar.stop()


def print_report(report: Report, checkpoint: str) -> None:
    """Say in a few lines what became of a job."""
    found = report.as_dict()
    way = report.way
    counts = [f"{report.done} {way.name}d"]
    counts += [f"{report.present} were there"] if report.present else []
    counts += [f"[red]{len(report.failures)} failed[/red]"] if report.failures else []
    counts += [f"{report.left} left: run again with --resume"] if report.left else []
    facts = {_things(way): ", ".join(counts), "folder": _shown(report.out)}
    if report.done:
        facts["time"] = (
            f"{time_in_words(report.seconds)}, {found['images_per_second']:.1f} images/s, "
            f"{found['megapixels_per_second']:.2f} megapixels/s"
        )
    if report.idle_share is not None:
        facts[way.network] = f"waited {report.idle_share:.1%} of its time for reading and writing"
    if checkpoint == "demo":
        facts["note"] = f"[yellow]{DEMO_NOTE}[/yellow]"
    console = Console(highlight=False)
    if report.failures:
        console.print()
    print_facts(console, facts)


def skipped_in_words(files: int) -> str:
    """Return the words that say why so many files give no image although nothing is wrong with them."""
    return f"{files} files skipped: they hold what a text encoder gave, or a trainer's lists, and no latents"


def print_failures(console: Console, report: Report) -> None:
    """Print the first failures in full, or all of them where failures.jsonl could not be written."""
    shown = report.failures if report.log_problem else report.failures[:_FAILURES_SHOWN]
    soft_wrap = not console.is_terminal  # in a pipe, a long line must not become several
    for failure in shown:
        where = _shown(failure.source) + (f" row {failure.row}" if failure.row else "")
        told = Text.assemble(("failed ", "red"), f"{where}: {failure.message}")
        console.print(told, highlight=False, soft_wrap=soft_wrap)
    if report.log_problem:
        console.print(f"{FAILURES} cannot be written: {report.log_problem}", markup=False, soft_wrap=True)
    elif report.failures:
        more = len(report.failures) - len(shown)
        also = f"{more} more, and these, are" if more else "Also"
        console.print(
            f"{also} in {_shown(report.out).rstrip('/')}/{FAILURES}", markup=False, highlight=False, soft_wrap=True
        )


def print_outlook(found: Estimate) -> None:
    """Say what a job would do."""
    console = Console(highlight=False)
    outlook = found.outlook
    counts = [f"{len(outlook.items)} to decode, {outlook.pixels / 1e6:.1f} megapixels"]
    counts += [f"{outlook.present} are there"] if outlook.present else []
    counts += [f"{outlook.skipped} files skipped: no latents"] if outlook.skipped else []
    counts += [f"[red]{len(outlook.failures)} cannot be decoded[/red]"] if outlook.failures else []
    print_facts(
        console,
        {
            "images": ", ".join(counts),
            "folder": _shown(found.out),
            "decoder": f"{found.checkpoint}, {found.dtype} on {found.device}",
            **({"note": f"[yellow]{DEMO_NOTE}[/yellow]"} if found.checkpoint == "demo" else {}),
            **({"note": f"[yellow]{PREVIEW_NOTE}[/yellow]"} if outlook.approximate else {}),
            "time": f"about {time_in_words(found.seconds)} on this machine, by itself",
        },
    )
    table = Table("size", "images", "in one decode", "peak memory", box=None, header_style="bold", pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for row in found.sizes:
        peak = f"[red]{row.problem}[/red]" if row.problem else size_in_words(row.peak_bytes)
        table.add_row(f"{row.height} x {row.width}", str(row.images), str(row.batch), peak)
    console.print()
    console.print(table)
    for failure in outlook.failures[:_FAILURES_SHOWN]:
        console.print(f"{failure.source}: {failure.message}", style="red", markup=False, soft_wrap=True)


def _things(way: Way) -> str:
    """What a job makes, in the plural."""
    return "images" if way == DECODE else "latents"


def _shown(folder: str) -> str:
    """Return a folder's path, relative to the working directory where it lies below that."""
    here = os.getcwd()
    return os.path.relpath(folder) if folder.startswith(f"{here}/") else folder


def time_in_words(seconds: float) -> str:
    """Return a time as people read it: ``"0.8 s"``, ``"4 min 10 s"`` or ``"3 h 2 min"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
