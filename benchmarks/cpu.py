"""Compares a full FLUX decoder on a CPU in this engine and in every other one, on the same latents.

    uv run --group bench benchmarks/cpu.py                                  # all engines, 512 and 1024
    uv run --group bench benchmarks/cpu.py --sizes 512 --only fluxvae diffusers-f32 openvino-f32
    uv run --group bench benchmarks/cpu.py --model flux2 --sizes 512        # or flux2-small: FLUX.2's decoders
    uv run --group bench benchmarks/cpu.py --scaling      # ours: 256 to 2048 pixels, 1, 2, 4 ... threads

Every engine runs in a process of its own, so that its peak memory and its threads are its own. Building, converting and
compiling a model is timed separately. The first decode gives the peak of memory above the loaded model. Then the
engines decode in turn, ``--repeats`` times, since a machine's speed may swing by a third within minutes: the medians of
the seconds, and of the ratios within each round, are what counts. Between two turns an engine rests while the others
decode, and a virtual machine's host takes back what it has freed meanwhile. With ``--twice`` every turn is two decodes,
and the second counts, as where one image is decoded after the other. CPU seconds, summed over all threads, tell more
than wall time where other processes are running; with one thread none of them is spent waiting. Errors are measured
against a float64 decode by diffusers, which takes minutes and is kept in ``--work``: the largest error, the share of
bytes that change, and by how many levels at most. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fluxvae.engine.exact import ExactDecoder
from fluxvae.verify.oracle import level_difference
from measure import MODELS, earlier_rows, full_vae, machine, measure, raw_latents

Decode = Callable[[torch.Tensor], torch.Tensor]
Build = Callable[[str, torch.Tensor], Decode]
"""Builds an engine from the model's name and raw latents of the size that it will decode."""


class _Decoder(torch.nn.Module):
    """The module that is exported and compiled for other engines: raw latents in, pixels out."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = self.vae.decode(raw, return_dict=False)[0]
        return image


def _exact(kernels: str, dtype: torch.dtype = torch.float32, *, keep_memory: bool = False) -> Build:
    def build(model: str, raw: torch.Tensor) -> Decode:
        engine = ExactDecoder(full_vae(model, dtype), kernels=kernels, keep_memory=keep_memory)
        engine.decode(raw[:, :, :2, :2].to(dtype))  # compiles the kernels, or loads compiled ones
        return lambda raw: engine.decode(raw.to(dtype))

    return build


def _diffusers(dtype: torch.dtype) -> Build:
    def build(model: str, raw: torch.Tensor) -> Decode:
        vae = full_vae(model, dtype)
        return lambda raw: vae.decode(raw.to(dtype, memory_format=torch.channels_last), return_dict=False)[0]

    return build


def _compiled(model: str, raw: torch.Tensor) -> Decode:
    compiled = torch.compile(_Decoder(full_vae(model)))
    compiled(raw)
    return lambda raw: compiled(raw)


def _openvino(precision: str) -> Build:
    def build(model: str, raw: torch.Tensor) -> Decode:
        import openvino

        converted = openvino.convert_model(_Decoder(full_vae(model)), example_input=raw, input=[tuple(raw.shape)])
        config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.Core().compile_model(converted, "CPU", config)
        return lambda raw: torch.from_numpy(next(iter(compiled([raw.numpy()]).values())))

    return build


def _onnxruntime(model: str, raw: torch.Tensor) -> Decode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "decoder.onnx")
        torch.onnx.export(_Decoder(full_vae(model)), (raw,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda raw: torch.from_numpy(session.run(None, {name: raw.numpy()})[0])


ENGINES: dict[str, tuple[str, Build]] = {
    "fluxvae": ("fluxvae, Winograd float32", _exact("winograd")),
    "fluxvae-kept": ("fluxvae, keep_memory", _exact("winograd", keep_memory=True)),
    "diffusers-f32": ("diffusers float32", _diffusers(torch.float32)),
    "openvino-f32": ("OpenVINO f32", _openvino("f32")),
    "fluxvae-direct": ("fluxvae, direct float32", _exact("torch")),
    "compile-f32": ("torch.compile float32", _compiled),
    "onnxruntime": ("ONNX Runtime float32", _onnxruntime),
    "fluxvae-bf16": ("fluxvae, bfloat16 weights", _exact("winograd", torch.bfloat16)),
    "diffusers-bf16": ("diffusers bfloat16", _diffusers(torch.bfloat16)),
    "openvino-bf16": ("OpenVINO bf16", _openvino("bf16")),
}
LARGEST_REFERENCE = 768
"""The largest size, in pixels each way, at which diffusers makes the float64 reference. Above it that takes more than
24 GB, and the exact engine makes the reference instead. In float64 the two are the same function to 4e-14
(`fluxvae.verify.tolerances.ENGINE_FLOAT64_ERROR`)."""
FLOAT32 = ("diffusers-f32", "openvino-f32")
"""The float32 engines that others are compared with: "times faster" is against the faster of these."""


def reference(model: str, size: int, work: Path) -> torch.Tensor:
    """Return the float64 decode, from the file of an earlier run if there is one."""
    path = work / f"reference-{model}-{size}.npy"
    if not path.exists():
        print(f"float64 reference of {model} at {size} ...", file=sys.stderr, flush=True)
        vae, raw = full_vae(model, torch.float64), raw_latents(model, size).double()
        with torch.inference_mode():
            if size <= LARGEST_REFERENCE:
                image = vae.decode(raw, return_dict=False)[0]
            else:
                image = ExactDecoder(vae, kernels="torch").decode(raw)
        np.save(path, image.numpy())
    return torch.from_numpy(np.load(path))


def to_uint8(image: torch.Tensor) -> Any:
    """Round an image to bytes as VaeImageProcessor does."""
    return ((image.double() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def serve(name: str, model: str, size: int, threads: int, work: Path, compare: bool) -> None:
    """Build one engine in this process, and decode once for every line that comes; each answer is a line of JSON.

    The first answer is about the first decode, which warms up: its peak, and its errors where ``compare`` is set.
    """
    torch.set_num_threads(threads)
    raw = raw_latents(model, size)
    with torch.inference_mode():
        start = time.perf_counter()
        decode = ENGINES[name][1](model, raw)
        build = time.perf_counter() - start
        first = measure(lambda: decode(raw))
        found: dict[str, Any] = {"build_seconds": round(build, 2), "peak_bytes": first.peak_bytes}
        if compare:
            expected, image = reference(model, size, work), first.result.double()
            error = image - expected
            difference = level_difference(to_uint8(image), to_uint8(expected))
            found |= {
                "max_error": float(error.abs().max()), "rms_error": float(error.square().mean().sqrt()),
                "changed": difference.changed, "levels": difference.largest,
            }  # fmt: skip
        del first
        print(json.dumps(found), flush=True)
        for _ in sys.stdin:
            start, before = time.perf_counter(), time.process_time()
            decode(raw)
            seconds, processor = time.perf_counter() - start, time.process_time() - before
            print(json.dumps({"seconds": round(seconds, 3), "cpu_seconds": round(processor, 3)}), flush=True)


class Child:
    """One engine in a process of its own, so that its peak memory and its threads are its own."""

    def __init__(self, *options: object) -> None:
        command = [sys.executable, __file__, "--child", *map(str, options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> dict[str, Any]:
        """The next answer; that the process failed, if it has ended."""
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # what libraries print is not an answer
                result: dict[str, Any] = json.loads(line)
                return result
        return {"failed": self._process.wait()}

    def decode(self) -> dict[str, Any]:
        """Decode once."""
        assert self._process.stdin is not None
        self._process.stdin.write("decode\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def in_turn(
    names: list[str], size: int, threads: int, repeats: int, compare: bool, common: list[Any], *, twice: bool = False
) -> list[Any]:
    """Build the engines one after the other, then have them decode in turn; one row for each.

    The speed of a machine may swing by a third within minutes. Engines that take turns have the same minutes. Where
    a turn is two decodes, the second one counts.
    """
    rows, children = [], {}
    for name in names:
        print(f"{ENGINES[name][0]}, {size} pixels, {threads} threads: building ...", file=sys.stderr, flush=True)
        child = Child(name, size, threads, int(compare), *common)
        row = {"engine": name, "size": size, "threads": threads, **child.answer()}
        rows.append(row)
        if "failed" not in row:
            children[name] = child
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
    for number in range(repeats):
        print(f"round {number + 1} of {repeats} ...", file=sys.stderr, flush=True)
        for name, child in children.items():
            if twice:
                child.decode()
            rounds[name].append(child.decode())
    for row in rows:
        if row["engine"] not in children:
            continue
        children[row["engine"]].close()
        own = rounds[row["engine"]]
        failed = [one["failed"] for one in own if "failed" in one]
        if failed:
            row["failed"] = failed[0]
            continue
        row["rounds"] = [one["seconds"] for one in own]
        for what in ("seconds", "cpu_seconds"):
            row[what] = round(statistics.median(one[what] for one in own), 3)
    return rows


def compare_table(rows: list[dict[str, Any]]) -> Table:
    """One line for each engine; "times faster" is the median of the rounds' ratios to the faster float32 peer."""
    table = Table(
        "size", "engine", "seconds", "spread", "times faster", "spread", "CPU seconds", "peak", "max error", "changed",
        "by",
    )  # fmt: skip
    for row in rows:
        if "failed" in row:
            table.add_row(str(row["size"]), ENGINES[row["engine"]][0], f"failed ({row['failed']})")
            continue
        peers = [r for r in rows if r["size"] == row["size"] and r["engine"] in FLOAT32 and "seconds" in r]
        ratios: list[float] = []
        if peers:
            best = min(peers, key=lambda peer: peer["seconds"])
            ratios = [theirs / ours for theirs, ours in zip(best["rounds"], row["rounds"], strict=True)]
        row["ratio"] = round(statistics.median(ratios), 2) if ratios else None
        error = [f"{row['max_error']:.1e}", f"{row['changed']:.4%}", str(row["levels"])] if "changed" in row else []
        table.add_row(
            str(row["size"]), ENGINES[row["engine"]][0], f"{row['seconds']:.2f}",
            f"{min(row['rounds']):.2f} to {max(row['rounds']):.2f}",
            f"{row['ratio']:.2f}" if ratios else "", f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "",
            f"{row['cpu_seconds']:.2f}", f"{row['peak_bytes'] / 1e9:.2f} GB", *error,
        )  # fmt: skip
    return table


def doubled(most: int) -> list[int]:
    """Numbers of threads to try: 1, 2, 4 and so on up to ``most``, and that itself."""
    return sorted({2**k for k in range(most.bit_length())} | {most})


def scaling_table(rows: list[dict[str, Any]]) -> Table:
    """One line for each size and number of threads; the efficiency is the share of each thread's time that counts."""
    table = Table("size", "threads", "seconds", "times faster", "efficiency", "seconds per megapixel", "peak")
    for row in rows:
        alone = next(one["seconds"] for one in rows if one["size"] == row["size"] and one["threads"] == 1)
        row["efficiency"] = round(alone / row["seconds"] / row["threads"], 3)
        row["seconds_per_megapixel"] = round(row["seconds"] / (row["size"] ** 2 / 1e6), 2)
        table.add_row(
            str(row["size"]), str(row["threads"]), f"{row['seconds']:.2f}", f"{alone / row['seconds']:.2f}",
            f"{row['efficiency']:.0%}", f"{row['seconds_per_megapixel']:.2f}", f"{row['peak_bytes'] / 1e9:.2f} GB",
        )  # fmt: skip
    return table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw bars of seconds per engine, one panel per size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({row["size"] for row in rows})
    figure, axes = plt.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 3.6), squeeze=False, layout="constrained")
    for axis, size in zip(axes[0], sizes, strict=True):
        chosen = sorted((r for r in rows if r["size"] == size and "seconds" in r), key=lambda r: -r["seconds"])
        names = [ENGINES[row["engine"]][0] for row in chosen]
        colours = ["#d1495b" if row["engine"].startswith("fluxvae") else "#8d99ae" for row in chosen]
        axis.bar_label(axis.barh(names, [row["seconds"] for row in chosen], color=colours), fmt="%.1f s", padding=3)
        axis.set_title(f"{size}x{size}, seconds")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=ENGINES, default=list(ENGINES), help="the engines to run (default: all)"
    )
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="flux",
        help="which decoder; each has full widths and seeded weights (default: flux)",
    )
    parser.add_argument(
        "--sizes",
        nargs="*",
        type=int,
        default=[512, 1024],
        help="the sizes of the images in pixels each way (default: 512 1024)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="how many threads each engine computes with (default: PyTorch's choice, %(default)s)",
    )
    parser.add_argument(
        "--twice",
        action="store_true",
        help="decode twice in each turn, and time the second decode",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        help="how many decodes of each engine are timed; the median counts (default: %(default)s)",
    )
    parser.add_argument(
        "--no-errors", action="store_true", help="measure no errors, which saves a float64 decode of minutes"
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="measure how ours alone grows instead: 256 to 2048 pixels, with 1, 2, 4, ... and --threads threads",
    )
    parser.add_argument("--plot", type=Path, help="draw the results into this file, an SVG or a PNG")
    parser.add_argument(
        "--earlier", nargs="+", type=Path, default=[], help="files with what earlier runs printed, to be drawn too"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("out/benchmark-cpu"),
        help="the folder that keeps the float64 decodes, so that they are computed once (default: %(default)s)",
    )
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.child:
        name, size, threads, compare = args.child
        serve(name, args.model, int(size), int(threads), args.work, bool(int(compare)))
        return 0
    console, common = Console(width=150), ["--work", args.work, "--model", args.model]
    if args.scaling:
        rows = [
            *(row for size in (256, 512, 1024, 2048) for threads in doubled(args.threads)
              for row in in_turn(["fluxvae"], size, threads, args.repeats, False, common, twice=args.twice))
        ]  # fmt: skip
    else:
        if not args.no_errors:
            for size in args.sizes:
                reference(args.model, size, args.work)
        rows = [
            *(row for size in args.sizes
              for row in in_turn(
                  args.only, size, args.threads, args.repeats, not args.no_errors, common, twice=args.twice))
        ]  # fmt: skip
    console.print(scaling_table(rows) if args.scaling else compare_table(rows))
    if args.plot:
        plot(earlier_rows(args.earlier) + rows, args.plot)
    print(json.dumps({"benchmark": "cpu", **machine(), "model": args.model, "twice": args.twice, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
