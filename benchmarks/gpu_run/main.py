"""The command line of `benchmarks/gpu.py`: a run, a child process of it, or its rehearsal. Imports no PyTorch."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_run import lines, stand_ins, supervise
from gpu_run.log import Log
from gpu_run.parts import PARTS, SANITIZE, Part, named
from gpu_run.report import report
from gpu_run.sglang_files import FILES
from gpu_run.verdicts import verdicts

__all__ = ["main"]

ROOT = Path(__file__).parents[2]
REHEARSED = (
    *PARTS[:2],
    Part("fault: raises", "faults.raises", 0, 30),
    Part("fault: rows", "rehearsal.rows_fail", 0, 30),
    *PARTS[2:8],
    Part("fault: loses the context", "rehearsal.loses", 0, 30),
    Part("fault: hangs", "faults.hangs", 0, 0.5),
    Part("fault: dies", "faults.dies", 0, 30),
    PARTS[9],
    PARTS[8],
    *(part._replace(fresh=False) for part in PARTS[10:]),
    Part("fault: no time among others", "faults.raises", 1e9, 1),
    SANITIZE[-1],
    Part("fault: no time", "faults.raises", 1e9, 1, (), True),
)
"""All parts, and in between what goes wrong. A process starts anew after the faults, so no part needs a fresh one."""
FAILURES = {
    "fault: raises": "ValueError: rehearsed",
    "fault: loses the context": "the CUDA context is lost",
    "fault: hangs": "it was ended after 0 s",
    "fault: dies": "its process ended with signal SIGKILL",
    "exits": "its process ended with exit status 0",
    "does not begin": "its process did not begin or end",
    "the run": "it was interrupted",
}
"""What must fail in a rehearsal, by its part, and with which words; and nothing else may."""
WRONG = {"smoke", "decodes 512", "pytest", "fault: rows"}
"""The parts in which a rehearsal finds something wrong: no CUDA kernels, a peak above its limit, a test, no time."""


def main(description: str, script: Path, arguments: list[str]) -> int:
    """Run what the arguments say and return the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="*", help="names of parts to run alone, such as 'decodes 1024' (default: all there is time for)")
    add("--seconds", type=float, default=470.0, help="how long the run may take (default: %(default)s)")
    add(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT", "out/gpu")),
        help="a folder (default: $OUT or %(default)s)",
    )
    add("--sglang", type=Path, default=ROOT / ".gpu" / "sglang", help="SGLang's files (default: %(default)s)")
    add("--sanitize", action="store_true", help="run compute-sanitizer instead")
    add("--rehearse", action="store_true", help="run everything on a CPU, tiny, with everything that may go wrong")
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        return _child(options.child)
    out: Path = options.out.resolve()
    if (out / "rows.jsonl").exists():
        parser.error(f"--out: got {out}, which has the rows of another run; expected a new folder")
    try:
        parts = named(options.parts, SANITIZE if options.sanitize else REHEARSED if options.rehearse else PARTS)
    except ValueError as error:
        parser.error(f"parts: {error}")
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    deadline = time.monotonic() + options.seconds
    log = Log(out / "rows.jsonl")
    settings = {"log": str(log.path), "rehearsed": options.rehearse, "out": str(out), "sglang": str(options.sglang)}
    if options.rehearse:
        _get_ready(settings, out)
    supervise.supervise(script, parts, log, deadline, settings)
    if options.rehearse and not options.parts:
        _supervision(out, log, deadline)
        for arguments in (["--out", str(out)], ["no such part", "--out", str(out / "new")]):
            with suppress(SystemExit):
                main(description, script, arguments)
    made = report(Log(log.path).new(), out, options.rehearse)
    told = _told(Log(log.path).new(), out) if options.rehearse else made["failed"] + made["wrong"]
    print(json.dumps(made, default=str))  # not rehearsed: after the count
    return int(bool(told))  # not rehearsed: after the count


def _child(given: dict[str, Any]) -> int:
    from gpu_run.child import run

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides when this process ends
    parts = named(given["parts"], REHEARSED if given["rehearsed"] else PARTS + SANITIZE[1:])
    log, out, sglang = Log(Path(given["log"])), Path(given["out"]), Path(given["sglang"])
    return run(parts, log, given["deadline"], given["rehearsed"], out, sglang)


def _get_ready(settings: dict[str, Any], out: Path) -> None:
    """Make what a rehearsal has in the place of NVIDIA's programs and, where it is not there, of SGLang."""
    stand_ins.commands(out / "bin")
    os.environ["PATH"] = f"{out / 'bin'}{os.pathsep}{os.environ['PATH']}"
    stand_ins.without_sglang(out / "sglang")
    there = all((Path(settings["sglang"]) / name).exists() for name in FILES)
    settings["sglang"] = settings["sglang"] if there else str(out / "sglang")


def _supervision(out: Path, log: Log, deadline: float) -> None:
    """Rehearse the supervisor alone: a process that does nothing, one that never begins, and an interrupt."""
    before, supervise.START = supervise.START, 0.5
    for name, code in (
        ("exits", ""),
        ("does not begin", "import time; time.sleep(60)"),
        ("interrupted", "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"),
    ):
        script = out / "fault.py"
        script.write_text(code)
        supervise.supervise(script, (Part(name, "", 0, 1),), log, deadline, {})
    supervise.START = before
    verdicts([])


def _told(events: list[dict[str, Any]], out: Path) -> list[str]:
    """Print and return what a rehearsal shows to be wrong with this benchmark."""
    failed = {event["part"]: event["why"] for event in events if event["event"] == "failed"}
    told = [
        f"{part}: failed with {failed.get(part)!r}, expected {FAILURES.get(part)!r}"
        for part in sorted(failed.keys() | FAILURES.keys())
        if FAILURES.get(part, "nothing") not in failed.get(part, "")
    ]
    wrong = {event["part"] for event in events if event["event"] == "wrong"}
    told += [f"wrong in {sorted(wrong)}, expected in {sorted(WRONG)}"] if wrong != WRONG else []
    left, marked, count = lines.missed(Path(os.environ[lines.VARIABLE]))
    return _counted(told, left, marked, count)  # not rehearsed: after the count


def _counted(told: list[str], left: list[str], marked: list[str], count: int) -> list[str]:
    """Print what was counted; no statement of this can be among it."""
    told = told + [f"not rehearsed: {one}" for one in left]  # not rehearsed: after the count
    print(f"\nThe rehearsal: {count} statements, {len(left)} did not run")  # not rehearsed: after the count
    print("Without a card or a count:", *marked, sep="\n  ")  # not rehearsed: after the count
    print("Found:", *(told or ["all is as expected"]), sep="\n  ")  # not rehearsed: after the count
    return told  # not rehearsed: after the count
