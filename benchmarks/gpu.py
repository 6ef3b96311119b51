"""Measures FLUX's decoder on an NVIDIA GPU: this engine, its peers and the card itself, in at most eight minutes.

    bash benchmarks/on_a_card.sh                 # on a machine with a card: installs what it lacks, and runs everything
    python benchmarks/gpu.py --out FOLDER        # the same where everything is installed
    python benchmarks/gpu.py --out FOLDER 'decodes 1024' profile      # some parts
    python benchmarks/gpu.py --out FOLDER --sanitize                  # compute-sanitizer, three minutes
    python benchmarks/gpu.py --out FOLDER --rehearse                  # everything on a CPU, tiny

`gpu_run/parts.py` lists the parts, the most telling first. They run in child processes; whatever becomes of one (an
error, a lost CUDA context, a hang, a killed process), the next one runs. What no time is left for is skipped and named.
Every row is appended to `rows.jsonl` in the folder as it is measured, so that a run that is cut off loses nothing. A
run ends with a table of the decodes, a verdict for each goal, and one line of JSON, which `gpu.json` holds too.

Times are medians by CUDA events, with the least and the most. Peaks are of allocated memory above what was allocated
before; beside a pipeline they are of the whole card. Errors are rms errors against a float64 decode by diffusers of the
same weights and latents. Exits 1 where a part failed, a peak was above its limit, or something was not as it must be;
a goal that is missed is no failure of the run.

The rehearsal needs no card. It fakes `torch.cuda` where the parts call it, makes everything go wrong that may, and
fails if a statement of `gpu_run` did not run.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve()


def start() -> int:
    """Run the command line, watched if it is a rehearsal or a child process of one."""
    source = str(HERE.parents[1] / "src")
    sys.path[:0] = [str(HERE.parent), source]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))  # for pytest
    from gpu_run import lines

    if "--rehearse" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the Triton language
        os.environ[lines.VARIABLE] = tempfile.mkstemp(suffix=".lines")[1]
    if lines.VARIABLE in os.environ:
        lines.watch()
    from gpu_run.main import main

    return main(__doc__ or "", HERE, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(start())
