"""Parts that check rather than measure: the machine, a first decode, `pytest -m gpu`, compute-sanitizer."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from contextlib import suppress
from pathlib import Path

import torch

from fluxvae.engine.kernels.cuda.attention import cut_for
from gpu_run.bench import Bench, digest
from measure import machine as cpu_and_torch

__all__ = ["gpu_tests", "machine", "sanitizer", "smoke"]

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers", "accelerate", "numba", "nvidia-cudnn-frontend")


def machine(bench: Bench) -> None:
    """The card, its driver, and the versions of what computes on it."""
    told = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
    (bench.out / "nvidia-smi.txt").write_text(told.stdout + told.stderr)
    versions: dict[str, str] = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    with suppress(Exception):  # what tests of cuDNN's choices describe this card by
        import cudnn

        described = cudnn.create_device_properties(0).serialize()  # not rehearsed: cuDNN's own package
        (bench.out / "cudnn_device.bin").write_bytes(bytes(described))  # not rehearsed: cuDNN's own package
    properties = torch.cuda.get_device_properties(0)
    bench.row(
        kind="machine",
        card=torch.cuda.get_device_name(0),
        capability=list(torch.cuda.get_device_capability(0)),
        memory_bytes=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
        shared_memory_bytes=properties.shared_memory_per_block_optin,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        versions=versions,
        **{name: value for name, value in cpu_and_torch().items() if name in ("cpu", "threads")},
    )


def smoke(bench: Bench) -> None:
    """Which kernels serve, and why not others; what the first use costs; whether a second decode has the same bits."""
    engine, side = bench.ours(), bench.side(1024)
    seconds = engine.prepare()
    begun = time.perf_counter()
    plan = engine.plan(side, side)
    planned = time.perf_counter() - begun
    raw = bench.raw("flux", 1024, 1, "bfloat16")
    begun = time.perf_counter()
    first = engine.decode(raw)
    torch.cuda.synchronize()
    decoded = time.perf_counter() - begun
    second = engine.decode(raw)
    bench.row(
        kind="smoke",
        kernels=plan.kernels,
        note=plan.kernels_note,
        cut=str(cut_for(bench.device, 512, 2)),
        prepare_s=seconds,
        plan_s=planned,
        first_decode_s=decoded,
        planned_bytes=plan.peak_bytes,
        same_bits=torch.equal(first, second),
        digest=digest(first),
        text=str(plan),
    )
    bench.must(torch.equal(first, second), "two decodes of the same latents differ")
    told = f"the kernels are {plan.kernels!r}; {plan.kernels_note or 'no note'}"
    bench.must(plan.kernels == "cuda" and not plan.kernels_note, told)


def gpu_tests(bench: Bench) -> None:
    """``pytest -m gpu``. Neither the project's options nor its conftest are used: they want pytest-xdist."""
    report = bench.out / "pytest.xml"
    command = [sys.executable, "-m", "pytest", "--noconftest", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "gpu"]
    command += ["-q", "--durations", "12", "--tb", "short", f"--junitxml={report}", str(bench.tests)]
    with (bench.out / "pytest.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    print("\n".join((bench.out / "pytest.log").read_text().splitlines()[-40:]), flush=True)
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ET.parse(report).getroot().iter("testsuite"):
        counts = {name: count + int(suite.attrib[name]) for name, count in counts.items()}
    bad = [case.attrib["name"] for case in ET.parse(report).getroot().iter("testcase") if _failed(case)]
    bench.row(kind="pytest", **counts, failed_tests=bad)
    bench.must(not bad, f"{', '.join(bad)} failed (pytest.log)")


def _failed(case: ET.Element) -> bool:
    return case.find("failure") is not None or case.find("error") is not None


def sanitizer(bench: Bench) -> None:
    """compute-sanitizer's memcheck over `memcheck`: every kernel, and decodes that spill."""
    found = bench.out / "memcheck.txt"
    command = ["compute-sanitizer", "--tool", "memcheck", "--log-file", str(found), sys.executable]
    command += [str(Path(__file__).with_name("memcheck.py")), *(["--rehearse"] if bench.small else [])]
    # PyTorch's own cache of memory would hide accesses beyond what was allocated.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (bench.out / "memcheck.log").write_text(done.stdout + done.stderr)
    print("\n".join((done.stdout + done.stderr).splitlines()[-12:]), flush=True)
    summary = re.search(r"ERROR SUMMARY: (\d+) error", found.read_text() if found.exists() else "")
    errors = int(summary[1]) if summary else None
    same = done.stdout.count("same bits: True")
    bench.row(kind="sanitizer", errors=errors, exit_status=done.returncode, decodes=same)
    clean = errors == 0 and not done.returncode and same > 0 and "same bits: False" not in done.stdout
    bench.must(clean, f"compute-sanitizer: {errors} errors, exit status {done.returncode} (memcheck.txt, memcheck.log)")
