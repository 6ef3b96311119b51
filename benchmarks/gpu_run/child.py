"""A child process of a run: parts one after the other, each guarded, until one leaves the process unusable."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_run.log import Log
from gpu_run.parts import Part

__all__ = ["LOST", "run"]

LOST = 3
"""The exit status of a process whose CUDA context is lost: nothing after that can work in it."""


def run(parts: tuple[Part, ...], log: Log, deadline: float, rehearsed: bool, out: Path, sglang: Path) -> int:
    """Run the parts and return the exit status.

    Args:
        deadline: by `time.monotonic`. A part that needs longer than is left is skipped, and those after it are tried.
        out: the folder for what is written beside the log.
        sglang: the folder that `peer` reads SGLang's files from.
    """
    bench: Any = None
    for part in parts:
        left = deadline - time.monotonic()
        if left < part.needs:
            log.write("skipped", part.name, needs=part.needs, left=round(left, 1))
            continue
        log.write("begin", part.name, left=left)
        begun = time.monotonic()
        try:
            module, name = part.function.split(".")
            if bench is None and module != "faults":  # within the guard: it imports PyTorch and diffusers
                from gpu_run.bench import Bench

                bench = Bench(log, deadline, out, sglang, rehearsed)
            function = getattr(importlib.import_module(f"gpu_run.{module}"), name)
            if bench is None:
                function(None)
            else:
                bench.part = part.name
                with bench.session():
                    function(bench, *part.arguments)
        except Exception as error:
            traceback.print_exc()
            log.write("failed", part.name, why=f"{type(error).__name__}: {str(error)[:300]}")
        try:
            if bench is not None:
                bench.clean()
        except Exception as error:
            log.write("failed", part.name, why=f"the CUDA context is lost: {str(error)[:200]}")
            sys.stdout.flush()
            os._exit(LOST)  # the usual way out would ask the context again, and may hang
        log.write("end", part.name, seconds=round(time.monotonic() - begun, 2))
    return 0
