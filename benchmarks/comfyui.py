"""Compares decodes and encodes with and without the node "fluxvae VAE" in the real ComfyUI, on a CPU.

    python benchmarks/comfyui.py --comfyui ComfyUI --sizes 256 --vaes flux sd flux2 --encode --interrupt
    python benchmarks/comfyui.py --comfyui ComfyUI --sizes 1024 2048 --kinds own fluxvae

Needs a checkout of ComfyUI, and a Python that has both its requirements and fluxvae's. The checkout is not changed:
models, latents, pictures and the node pack lie in a temporary folder. VAEs have ComfyUI's full widths and seeded random
weights; "flux2" needs a ComfyUI that knows FLUX.2, and "layered", Qwen-Image-Layered's VAE of RGBA pictures, one that
knows that. "qwen" is the VAE of Qwen-Image and Wan 2.1.

Every case is a workflow of ComfyUI's own nodes around the VAE, sent to a server of its own, which has loaded the VAE
and compiled its code before: LoadLatent, VAELoader, (fluxvae VAE), VAEDecode or VAEDecodeTiled, SaveImage. The peak is
what the process adds meanwhile. Pictures are compared with those of plain VAEDecode as SaveImage wrote them, latents as
SaveLatent did. Exits 1 where one differs by more than `fluxvae.verify.tolerances` allows, or where an interruption does
not end a decode. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from fluxvae.verify.oracle import level_difference
from fluxvae.verify.tolerances import COMFYUI_LATENTS, EXACT_VS_REFERENCE_CHANGED_FULL, EXACT_VS_REFERENCE_LEVELS
from measure import machine

ROOT = Path(__file__).parent.parent
CHANNELS = {"flux": (16, 8), "sd": (4, 8), "flux2": (128, 16), "qwen": (16, 8), "layered": (16, 8)}
"""For each VAE the channels of a LATENT, and the pixels for each of its values."""
PICTURES = {"qwen": 3, "layered": 4}
"""The VAEs whose LATENTs have an axis of time, and the channels of their pictures."""
KINDS = ("own", "fluxvae", "own tiled", "fluxvae tiled")
DEADLINE_S = 3600.0


class Comfy:
    """One ComfyUI server on loopback.

    Args:
        checkout: the folder of ComfyUI.
        python: the interpreter that it runs with.
        base: the folder with models, inputs, outputs and custom nodes.
    """

    def __init__(self, checkout: Path, python: str, base: Path) -> None:
        self.base = base
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._log = base / "comfyui.log"
        port = self._url.rpartition(":")[2]
        command = [python, "main.py", "--cpu", "--port", port, "--base-directory", str(base), "--disable-auto-launch"]
        path = os.pathsep.join((str(ROOT / "src"), os.environ.get("PYTHONPATH", "")))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=checkout, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}
            )
        deadline = time.monotonic() + 300
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"ComfyUI does not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.2)

    def close(self) -> None:
        """Stop the server, as Ctrl-C would."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(self, graph: dict[str, Any], interrupt_after: float | None = None) -> dict[str, Any]:
        """Run a workflow, and return its entry of the history.

        Args:
            interrupt_after: interrupts it this many seconds after the node's VAE has begun to decode.
        """
        prompt = self.ask("/prompt", {"prompt": graph})["prompt_id"]
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            history = self.ask(f"/history/{prompt}").get(prompt)
            if history is not None:
                return history
            if interrupt_after is not None and self._at_work():
                time.sleep(interrupt_after)
                self.ask("/interrupt", {})
                interrupt_after = None
            time.sleep(0.02)
        raise SystemExit(f"ComfyUI is not done after {DEADLINE_S:g} s:\n{self._log.read_text()[-3000:]}")

    def measured(self, graph: dict[str, Any]) -> tuple[dict[str, Any], float, int]:
        """Run a workflow; return its history, the seconds it took, and the bytes that it added at its peak."""
        folder = Path(f"/proc/{self._process.pid}")
        (folder / "clear_refs").write_text("5")
        before, start = _kilobytes(folder, "VmRSS"), time.perf_counter()
        history = self.run(graph)
        return history, time.perf_counter() - start, 1024 * (_kilobytes(folder, "VmHWM") - before)

    def ask(self, path: str, data: dict[str, Any] | None = None) -> Any:
        """Send a request, and return its answer."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self._url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise SystemExit(f"ComfyUI refused {path}: {error.read().decode()}") from error

    def _answers(self) -> bool:
        try:
            self.ask("/system_stats")
        except OSError:
            return False
        return True

    def _at_work(self) -> bool:
        return "fluxvae: decodes" in self._log.read_text(errors="replace")[self._seen :]

    _seen = 0

    def forget_log(self) -> None:
        """Look only at what the log gets from now on."""
        self._seen = len(self._log.read_text(errors="replace"))


def _kilobytes(folder: Path, field: str) -> int:
    lines = (folder / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def workflow(kind: str, vae: str, latent: str, limit: float, end: str) -> dict[str, Any]:
    """Make a workflow in ComfyUI's form for its API.

    Args:
        kind: one of `KINDS`.
        end: ``"image"``: what was decoded is saved. ``"latent"``: it is encoded again, and the latents are saved.
    """
    graph: dict[str, Any] = {
        "latent": {"class_type": "LoadLatent", "inputs": {"latent": latent}},
        "loader": {"class_type": "VAELoader", "inputs": {"vae_name": f"{vae}.safetensors"}},
    }
    source = ["loader", 0]
    if kind.startswith("fluxvae"):
        inputs = {"vae": source, "memory_limit": limit, "other_vaes": "refuse"}
        graph["fluxvae"] = {"class_type": "FluxvaeExactVAE", "inputs": inputs}
        source = ["fluxvae", 0]
    tiles = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    tiled = kind.endswith("tiled")
    given = {"samples": ["latent", 0], "vae": source, **(tiles if tiled else {})}
    graph["decode"] = {"class_type": "VAEDecodeTiled" if tiled else "VAEDecode", "inputs": given}
    if end == "image":
        graph["save"] = {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "image"}}
    else:
        given = {"pixels": ["decode", 0], "vae": source, **(tiles if tiled else {})}
        graph["encode"] = {"class_type": "VAEEncodeTiled" if tiled else "VAEEncode", "inputs": given}
        graph["save"] = {"class_type": "SaveLatent", "inputs": {"samples": ["encode", 0], "filename_prefix": "latent"}}
    return graph


def saved(base: Path, history: dict[str, Any]) -> list[Path]:
    """The files that a workflow has saved."""
    if history["status"]["status_str"] != "success":
        raise SystemExit(f"the workflow failed: {json.dumps(history['status'])[:3000]}")
    found = [
        one for output in history["outputs"].values() for name in ("images", "latents") for one in output.get(name, [])
    ]
    return [base / "output" / one["subfolder"] / one["filename"] for one in found]


def make_vae(name: str) -> dict[str, torch.Tensor]:
    """The weights of a VAE of ComfyUI's full widths, seeded, with names that ComfyUI reads: diffusers' or Wan's."""
    torch.manual_seed(0)
    if name in PICTURES:
        sys.path.insert(0, str(ROOT / "tests"))
        from diffusers import AutoencoderKLQwenImage

        from checkpoint_files import wan_state_dict

        return wan_state_dict(AutoencoderKLQwenImage(input_channels=PICTURES[name]))
    if name == "flux2":
        from diffusers import AutoencoderKLFlux2

        vae: Any = AutoencoderKLFlux2()
        vae.bn.running_var.uniform_(0.5, 2)
    else:
        blocks: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
        }
        own = {"use_quant_conv": False, "use_post_quant_conv": False} if name == "flux" else {}
        vae = AutoencoderKL(**blocks, latent_channels=CHANNELS[name][0], **own)
    return {key: tensor.contiguous() for key, tensor in vae.state_dict().items()}


def make_latents(name: str, size: int) -> dict[str, torch.Tensor]:
    """Seeded latents as SaveLatent writes them, smooth as a model's are."""
    channels, scale = CHANNELS[name]
    side = size // scale
    coarse = torch.randn(
        1, channels, max(side // 8, 2), max(side // 8, 2), generator=torch.Generator().manual_seed(size)
    )
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic") * 1.5
    if name in PICTURES:
        smooth = smooth[:, :, None]
    return {"latent_tensor": smooth.contiguous(), "latent_format_version_0": torch.tensor([])}


@contextmanager
def folder(vaes: list[str], sizes: list[int]) -> Iterator[Path]:
    """A base folder for ComfyUI, with the VAEs, the latents and the node pack."""
    with tempfile.TemporaryDirectory(prefix="fluxvae-comfyui-") as name:
        base = Path(name)
        for part in ("models/vae", "input", "output", "custom_nodes", "temp", "user"):
            (base / part).mkdir(parents=True)
        (base / "custom_nodes" / "fluxvae").symlink_to(ROOT / "comfyui")
        for vae in vaes:
            save_file(make_vae(vae), base / "models" / "vae" / f"{vae}.safetensors")
            for size in (64, *sizes):
                save_file(make_latents(vae, size), base / "input" / f"{vae}-{size}.latent")
        yield base


def run_case(args: argparse.Namespace, base: Path, vae: str, size: int, kind: str) -> dict[str, Any]:
    """Measure one kind at one size, and compare it with plain VAEDecode's picture of that size, if that was run."""
    comfy = Comfy(args.comfyui, args.python, base)
    try:
        comfy.run(workflow(kind, vae, f"{vae}-64.latent", args.limit, "latent"))  # loads and compiles
        graph = workflow(kind, vae, f"{vae}-{size}.latent", args.limit, "image")
        history, seconds, peak = comfy.measured(graph)
        [picture] = saved(base, history)
        row = {"vae": vae, "size": size, "kind": kind, "limit": args.limit, "seconds": seconds, "peak": peak}
        row["picture"] = picture.rename(base / f"{vae}-{size}-{kind}.png")
        if args.encode:
            history, row["encode_seconds"], row["encode_peak"] = comfy.measured(
                workflow(kind, vae, f"{vae}-{size}.latent", args.limit, "latent")
            )
            row["latents"] = saved(base, history)[0].rename(base / f"{vae}-{size}-{kind}.latent")
        return row
    finally:
        comfy.close()


def compare(rows: list[dict[str, Any]]) -> list[str]:
    """Add to each row how it differs from ComfyUI's own result of its size; return what should not be."""
    wrong = []
    for row in rows:
        own = next(
            (one for one in rows if (one["vae"], one["size"], one["kind"]) == (row["vae"], row["size"], "own")), None
        )
        if own is None or own is row:
            continue
        found = level_difference(*(np.asarray(Image.open(one["picture"])) for one in (row, own)))
        row["levels"], row["changed"] = found.largest, found.changed
        if "latents" in row:
            ours, theirs = (load_file(one["latents"])["latent_tensor"] for one in (row, own))
            row["latent_error"] = float((ours - theirs).abs().max())
        if not row["kind"].startswith("fluxvae"):
            continue
        allowed = EXACT_VS_REFERENCE_LEVELS["float32"].bound, EXACT_VS_REFERENCE_CHANGED_FULL.bound
        if (
            found.largest > allowed[0]
            or found.changed > allowed[1]
            or row.get("latent_error", 0) > COMFYUI_LATENTS.bound
        ):
            wrong.append(f"{row['vae']} {row['size']} {row['kind']}: {found}, latents by {row.get('latent_error')}")
    return wrong


def interruption(args: argparse.Namespace, base: Path, vae: str, size: int) -> list[str]:
    """Interrupt a decode by the node's VAE, and decode again; return what should not be."""
    comfy = Comfy(args.comfyui, args.python, base)
    try:
        comfy.run(workflow("fluxvae", vae, f"{vae}-64.latent", args.limit, "image"))
        comfy.forget_log()
        graph = workflow("fluxvae", vae, f"{vae}-{size}.latent", args.limit, "image")
        status = comfy.run(graph, interrupt_after=1)["status"]
        kinds = [message[0] for message in status["messages"]]
        again = comfy.run(graph)["status"]["status_str"]
    finally:
        comfy.close()
    wrong = [] if "execution_interrupted" in kinds else [f"an interruption at {size} was not seen: {kinds}"]
    return wrong + ([] if again == "success" else [f"the decode after an interruption: {again}"])


def main() -> None:
    """Run all cases, print the table and the JSON, and exit 1 where a result is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="the folder of a checkout of ComfyUI")
    parser.add_argument(
        "--python", default=sys.executable, help="the Python that ComfyUI and fluxvae are installed for"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[512], help="pixels, each way")
    parser.add_argument("--vaes", nargs="+", choices=CHANNELS, default=["flux"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--limit", type=float, default=1.0, help="the node's memory limit in GiB")
    parser.add_argument("--encode", action="store_true", help="encode what was decoded, too")
    parser.add_argument("--interrupt", action="store_true", help="interrupt a decode of the first VAE and largest size")
    args = parser.parse_args()
    rows, console = [], Console(stderr=True)
    with folder(args.vaes, args.sizes) as base:
        for vae in args.vaes:
            for size in args.sizes:
                for kind in args.kinds:
                    console.print(f"{vae} {size} {kind} ...")
                    rows.append(run_case(args, base, vae, size, kind))
        wrong = compare(rows)
        if args.interrupt:
            wrong += interruption(args, base, args.vaes[0], max(args.sizes))
    table = Table("VAE", "size", "decode", "seconds", "peak, GB", "levels", "bytes changed", "encode: s", "GB", "error")
    for row in rows:
        table.add_row(
            row["vae"], str(row["size"]), row["kind"], f"{row['seconds']:.1f}", f"{row['peak'] / 1e9:.2f}",
            str(row.get("levels", "")), f"{row['changed']:.3%}" if "changed" in row else "",
            f"{row['encode_seconds']:.1f}" if args.encode else "",
            f"{row['encode_peak'] / 1e9:.2f}" if args.encode else "",
            f"{row['latent_error']:.1e}" if "latent_error" in row else "",
        )  # fmt: skip
    Console(width=130).print(table)
    for one in wrong:
        print(f"WRONG: {one}")
    told = [{name: value for name, value in row.items() if name not in ("picture", "latents")} for row in rows]
    print(json.dumps({"benchmark": "comfyui", "machine": machine(), "rows": told, "wrong": wrong}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
