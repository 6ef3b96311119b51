"""What every kernel of the Triton language takes of six kinds of NVIDIA cards, by compilers alone: no card is needed.

    PYTHONPATH=src python benchmarks/compiled.py [--cards 80,90] [--dtypes bfloat16] [--models FLUX.1] [--out FILE]

A line for each kernel and card as it is compiled, and everything once more in one line of JSON at the end. All six
cards, all models and all precisions are about 250 compilations, of half a second to a few seconds each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
import triton

from compiled_kernels import resources, wanted
from fake_card import CARDS, MODELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cards", default=",".join(map(str, CARDS)), help="compute capabilities: 80,86,89,90,100,120")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    asked = parser.parse_args()
    dtypes = [getattr(torch, name) for name in asked.dtypes.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # so that the seconds are those of compiling
        print(f"torch {torch.__version__}, triton {triton.__version__}")
        for capability in map(int, asked.cards.split(",")):
            room = CARDS[capability].shared_memory_per_block_optin
            for kernel in wanted(capability, dtypes, asked.models.split(",")):
                found = resources(kernel)
                rows.append(found._asdict() | {"card": capability})
                large = "!" if found.shared > room else " "
                print(
                    f"sm_{capability:<4d}{found.kernel:86s} shared {found.shared:6d}{large}"
                    f" registers {found.registers:3d} spilled {found.spilled:4d}{'!' if found.spilled else ' '}"
                    f" tmem {found.tensor_memory:3d} {found.seconds:5.1f} s  {' '.join(found.instructions)}",
                    flush=True,
                )
    report = json.dumps({"torch": torch.__version__, "triton": triton.__version__, "rows": rows})
    if asked.out is not None:
        asked.out.write_text(report + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
