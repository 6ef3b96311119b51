"""What ``fluxvae decode`` and ``fluxvae encode`` share: how a job is run, watched, stopped and told of."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import typer
from typer.core import TyperCommand

from fluxvae.cli.options import errors, print_json
from fluxvae.engine.way import Way
from fluxvae.errors import InvalidOptionError

if TYPE_CHECKING:
    from fluxvae.batch import Report

__all__ = ["SOME_FAILED", "STOPPED", "JobCommand", "check_existing", "check_ray", "run_job"]

SOME_FAILED = 6
"""The exit status where the job is done, but some of its inputs gave no image."""
STOPPED = 130
"""The exit status where a signal stopped the job while something was left to do."""


class JobCommand(TyperCommand):
    """Lets ``--ray`` stand with an address or alone: what follows it is an address only if it looks like one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments as typer does, after filling in the address that ``--ray`` alone stands for."""
        filled = []
        for index, word in enumerate(args):
            filled.append(word)
            following = args[index + 1] if index + 1 < len(args) else "-"
            if word == "--ray" and not _is_address(following):
                filled.append("local")
        return super().parse_args(ctx, filled)


def _is_address(word: str) -> bool:
    if word in ("local", "auto") or word.startswith("ray://"):
        return True
    host, colon, port = word.rpartition(":")
    return bool(host and colon and port.isdigit())


def check_existing(resume: bool, overwrite: bool) -> Literal["refuse", "resume", "overwrite"]:
    """Return what becomes of results that are there already.

    Raises:
        InvalidOptionError: both were asked for.
    """
    if resume and overwrite:
        raise InvalidOptionError("--resume and --overwrite: got both; give one of them")
    return "resume" if resume else "overwrite" if overwrite else "refuse"


def check_ray(ray: str | None, workers: int | None, threads: int | None) -> None:
    """Raise InvalidOptionError where something is said about a cluster that is not used."""
    if ray is None and (workers or threads):
        raise InvalidOptionError("--workers and --threads: got one without --ray, which they are for")


def run_job(run: Callable[..., Report], way: Way, checkpoint: str, *, on_ray: bool, as_json: bool) -> None:
    """Run a job to its end, show how it goes on and what became of it, and exit with the status of that.

    Args:
        run: does the job, and takes ``watcher`` and ``stop``.
    """
    from fluxvae.cli.decode_view import ProgressView, print_failures, print_report

    # Ray prints to standard output what happens to its processes.
    elsewhere = contextlib.redirect_stdout(sys.stderr) if on_ray else contextlib.nullcontext()
    with _signals() as stop, ProgressView(way, quiet=as_json) as view, elsewhere:
        report = run(watcher=view, stop=stop)
    print_failures(errors(), report)
    if as_json:
        print_json(report.as_dict())
    else:
        print_report(report, checkpoint)
    raise typer.Exit(STOPPED if report.stopped else SOME_FAILED if report.failures else 0)


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Let the first Ctrl-C or SIGTERM set an event that asks the job to stop, and a second one interrupt it."""
    stop = threading.Event()

    def ask(number: int, _: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
