"""What the kernels take of six kinds of NVIDIA cards, by compilers and cuDNN's own plans alone: no card is needed.

    PYTHONPATH=src python benchmarks/compiled.py [--cards 80,90] [--dtypes bfloat16] [--models FLUX.1] [--out FILE]

First every kernel of the Triton language: its registers, what it spills, its shared memory. Then every convolution of a
decode of 1024x1024: the engine that cuDNN would take, and its workspace. There is a line for each as it is found, and
everything once more in one line of JSON at the end. All cards, models and precisions are 318 compilations of about a
second each.
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
from described_cudnn import ask, convolutions, version
from fake_card import CARDS, MODELS
from fluxvae.engine.kernels.direct.costs import workspace_bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cards", default=",".join(map(str, CARDS)), help="compute capabilities: 80,86,89,90,100,120")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    asked = parser.parse_args()
    dtypes = [getattr(torch, name) for name in asked.dtypes.split(",")]
    rows, answers = [], []
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
    print(f"cuDNN {version()}")
    decoded = convolutions(dtypes, asked.models.split(","), [1024], encode=False)
    for capability in map(int, asked.cards.split(",")):
        for one, count in decoded.items():
            answer = ask(CARDS[capability], one)
            bound = workspace_bound((one.rows, one.width, one.cin), (one.cout, *one.kernel), one.dtype.itemsize)
            what = f"{one.rows}x{one.width} {one.cin}>{one.cout} {one.kernel[0]}x{one.kernel[1]} {str(one.dtype)[6:]}"
            answers.append([capability, what, count, answer.engine, sorted(answer.notes), answer.workspace, bound])
            print(
                f"sm_{capability:<4d}{what:30s} {count:3d} times  engine {answer.engine:3d}  workspace "
                f"{answer.workspace / 1e6:6.2f} of {bound / 1e6:6.2f} MB  {', '.join(sorted(answer.notes))}"
            )
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cudnn": version()}
    report = json.dumps(versions | {"rows": rows, "convolutions": answers})
    if asked.out is not None:
        asked.out.write_text(report + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
