"""Runs the parts in child processes, and goes on with the next part whatever becomes of one. Imports no PyTorch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_run.log import Log
from gpu_run.parts import Part

__all__ = ["supervise"]

START = 90.0
"""The seconds that a process has to begin its first part, and to end after its last one."""
LOOK = 0.1
"""The seconds between two looks at the log. (What is waited for is the child, which may end sooner.)"""


def supervise(script: Path, parts: tuple[Part, ...], log: Log, deadline: float, settings: dict[str, Any]) -> None:
    """Run all parts that there is time for.

    Args:
        script: what a child process runs, with ``--child`` and one argument of JSON.
        deadline: by `time.monotonic`, which is the same in all processes of a machine.
        settings: what `child.run` takes beside the names of the parts.
    """
    pending = list(parts)
    try:
        while pending:
            left = deadline - time.monotonic()
            if left < pending[0].needs:
                part = pending.pop(0)
                log.write("skipped", part.name, needs=part.needs, left=round(left, 1))
                continue
            # As many as may share a process; each of them is begun only if there is time for it then.
            count = next((at for at, part in enumerate(pending) if at and part.fresh), len(pending))
            over = _run(script, pending[:count], log, deadline, settings)
            pending = [part for part in pending if part.name not in over]
    except KeyboardInterrupt:
        log.write("failed", "the run", why="it was interrupted")


def _run(script: Path, group: list[Part], log: Log, deadline: float, settings: dict[str, Any]) -> set[str]:
    """Run one process until it ends or has to be ended, and return the names of the parts that are over."""
    log.new()  # what was before it
    given = settings | {"parts": [part.name for part in group], "deadline": deadline}
    command = [sys.executable, str(script), "--child", json.dumps(given)]
    child = subprocess.Popen(command, start_new_session=True)  # so that what it starts ends with it
    most = {part.name: part.most for part in group}
    begun: list[str] = []
    over: set[str] = set()
    running, until, why = "", time.monotonic() + START, ""

    def look() -> None:
        nonlocal running, until
        for event in log.new():
            name, kind = event["part"], event["event"]
            if kind == "begin":
                begun.append(name)
                running, until = name, min(time.monotonic() + most[name], max(deadline, time.monotonic() + 1))
            elif kind == "end":
                running, until = "", time.monotonic() + START
            over.update([name] if kind in ("end", "failed") or (kind == "skipped" and "what" not in event) else [])

    try:
        while child.poll() is None and not why:
            with suppress(subprocess.TimeoutExpired):
                child.wait(LOOK)
            look()
            if time.monotonic() > until and child.poll() is None:
                why = f"it was ended after {most[running]:.0f} s" if running else "its process did not begin or end"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
    look()
    # A process that gets to no part takes its first one with it: the next process would not get there either.
    for name in [name for name in begun if name not in over] or ([] if over else [group[0].name]):
        log.write("failed", name, why=why or f"its process ended with {_in_words(code)}")
        over.add(name)
    return over


def _in_words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
