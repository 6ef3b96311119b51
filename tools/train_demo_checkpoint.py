"""Trains the demo checkpoint, a small autoencoder in FLUX's format, from nothing on a CPU.

FLUX's own weights cannot ship in this package, and random weights only show noise. So the package carries this network:
an `AutoencoderKL` with FLUX.1's topology, factors and latent format, narrow enough for 8 MB and for two CPU cores.
`demo_pictures.py` says what it is trained on. Nothing is downloaded.

This is how it gets to a usable picture in an hour rather than a day:

- **The main path is trained first.** `demo_network.py` starts both halves as chains of a few convolutions, which alone
  nearly reach the quality of the whole network. Most of the hour goes to them, first on small crops and then on large
  ones (because GroupNorm's statistics will be those of whole pictures). The residual branches join in the last phase.
- **Muon trains the convolutions** (momentum, orthogonalised by a Newton-Schulz iteration), and AdamW the rest. What is
  kept is an exponential average of the weights. It computes in bfloat16 autocast and channels-last.
- **Each thread computes its own part of the batch**, instead of all threads sharing each operation. So nothing waits at
  a barrier for a core that another process holds, which on a busy machine more than doubles the speed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from demo_network import CHANNELS, SCALING_FACTOR, SHIFT_FACTOR, autoencode, build, standardise, start_linear
from demo_pictures import HELD_OUT, Crops, held_out, psnr, to_pixels, to_tensor

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 50  # the steps in which the rates rise, at the start of every phase
ADAM_RATE = 1 / 3  # AdamW's rate, as a share of the main path's
EMA = 0.998  # how much of the average is kept at each step, once there have been enough steps
DRIFT = 2e-4  # the weight of keeping latents standard in the loss: enough to guide, too little to cost quality


class Phase(NamedTuple):
    """One phase of the run: what is trained, for how long, on what, and how fast."""

    name: str
    linear: bool  # whether only the main path is trained
    minutes: float  # with --minutes, the phase gets a share of them that is proportional to this
    steps: int  # without --minutes, its length
    crops: tuple[tuple[int, int], ...]  # batches (crops, pixels) that are taken in turn, each divided among the workers
    main_rates: tuple[float, float]  # Muon's first and last rate for the main path, which is fine-tuned by cancellation
    residual_rates: tuple[float, float]  # Muon's first and last rate for the residual branches
    centre: bool = False  # whether the latents' means are moved to zero afterwards


ALL_SIZES = ((2, 192), (2, 256), (2, 384))
PHASES = (
    Phase("main path", True, 6, 1440, ((4, 96),), (0.006, 0.0003), (0.0, 0.0), centre=True),
    Phase("main path, standard latents", True, 2.5, 580, ((4, 96),), (0.0015, 0.0003), (0.0, 0.0)),
    Phase("main path, larger crops", True, 4.5, 275, ((2, 256),), (0.0006, 0.0001), (0.0, 0.0)),
    Phase("main path, all sizes", True, 7, 315, ALL_SIZES, (0.0004, 0.0001), (0.0, 0.0), centre=True),
    Phase("main path, annealed", True, 6, 395, ALL_SIZES, (0.0003, 0.00005), (0.0, 0.0)),
    Phase("everything", False, 6, 150, ALL_SIZES, (0.00004, 0.0), (0.00008, 0.0)),
)


class Muon(torch.optim.Optimizer):
    """An optimizer that replaces momentum's update by the nearest (semi-)orthogonal matrix.

    So every direction of a matrix learns at the same rate.
    """

    def __init__(self, params: list[dict], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]).flatten(1)
                rows, columns = update.shape
                scale = max(1.0, rows / columns) ** 0.5
                p.add_(self.orthogonalise(update).view_as(p), alpha=-group["lr"] * scale)

    @staticmethod
    def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
        x = matrix.bfloat16()
        x = x.T if matrix.shape[0] > matrix.shape[1] else x
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


def make_optimizers(vae: AutoencoderKL) -> tuple[Muon, torch.optim.AdamW]:
    """Make Muon for the hidden matrices, in groups for the main path and the residual branches, and AdamW for the rest.

    The rest are vectors and the two layers that read and write pixels.
    """
    pixels = (vae.encoder.conv_in.weight, vae.decoder.conv_out.weight)
    main, residual, rest = [], [], []
    for name, p in vae.named_parameters():
        if p.ndim == 1 or any(p is other for other in pixels):
            rest.append(p)
        else:
            (residual if any(part in name for part in ("conv1", "conv2", "attentions")) else main).append(p)
    muon = Muon([{"params": main}, {"params": residual}], lr=0.0)
    return muon, torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)


def loss_of(vae: AutoencoderKL, pixels: torch.Tensor, linear: bool) -> torch.Tensor:
    """Return the root-mean-square error, averaged over crops, plus a small term that keeps latents from drifting.

    The root is taken for each crop, so that hard crops do not drown the rest.
    """
    with torch.autocast("cpu", torch.bfloat16):
        raw, picture = autoencode(vae, pixels, linear)
    error = (picture.float() - pixels).square().mean((1, 2, 3))
    latents = (raw.float() - SHIFT_FACTOR) * SCALING_FACTOR
    drift = 10 * latents.mean((0, 2, 3)).square() + (latents.var((0, 2, 3)) + 0.05).log().square()
    return (error + 1e-5).sqrt().mean() + DRIFT * drift.mean()


@torch.no_grad()
def evaluate(vae: AutoencoderKL) -> dict[str, float]:
    """Return the PSNR of both held-out pictures at 512 pixels in dB, and the statistics of their scaled latents."""
    figures, latents = {}, []
    for name in HELD_OUT:
        picture = held_out(name)
        raw = vae.encode(to_tensor(picture).to(vae.dtype)).latent_dist.mode()
        latents.append((raw.float() - vae.config.shift_factor) * vae.config.scaling_factor)
        figures[name] = psnr(picture, to_pixels(vae.decode(raw).sample))
    both = torch.cat(latents)
    return {**figures, "latent_mean": both.mean().item(), "latent_std": both.std().item()}


def write_atomically(write: Callable[[Path], object], path: Path) -> None:
    """Call `write` with a temporary path, then move the result into place, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    if temporary.is_dir():
        path.mkdir(exist_ok=True)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
            os.replace(file, path / file.name)
        temporary.rmdir()
    else:
        os.replace(temporary, path)


def save(weights: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    """Write a diffusers folder in half precision, and return the network as a reader of it gets it, in float32."""
    vae = build()
    vae.load_state_dict(weights)
    torch.nn.Module.to(vae, dtype)  # diffusers' own `to` warns about layers that this network does not have
    write_atomically(lambda path: vae.save_pretrained(path, safe_serialization=True), folder)
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  train_demo_checkpoint.py --output out/demo                 the shipped recipe\n"
        "  train_demo_checkpoint.py --output out/quick --minutes 10   the same phases squeezed into ten minutes\n"
        "  train_demo_checkpoint.py --output out/demo --resume        go on after an interruption\n\n"
        "The seed fixes the initial weights and every crop. The exact bits of the result still depend on the\n"
        "number of threads, the processor and the library; the quality should not.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="the folder that config.json and the safetensors weights are written to",
    )
    parser.add_argument(
        "--length", type=float, default=1.0, help="a factor on the steps of every phase (default: 1, the recipe)"
    )
    parser.add_argument(
        "--minutes", type=float, help="how many minutes of wall time the run takes, instead of counting steps"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the seed of the initial weights and of every crop (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state file of an interrupted run")
    parser.add_argument(
        "--logs",
        type=Path,
        default=ROOT / "out" / "demo_training",
        help="the folder of the curve and the state file (default: %(default)s)",
    )
    parser.add_argument(
        "--evaluate-every",
        type=int,
        default=1000,
        metavar="STEPS",
        help="how many steps lie between two evaluations (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16"),
        default="float16",
        help="the precision of the saved weights (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="how many threads train, each with a part of a batch of its own (default: 2)",
    )
    return parser.parse_args(argv)


class Trainer:
    """The state of a run: the network, its optimizers, the averaged weights, and how far it has come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.set_num_threads(1)
        torch.manual_seed(args.seed)
        self.vae = build()
        start_linear(self.vae)
        self.vae.to(memory_format=torch.channels_last)
        self.parameters = list(self.vae.parameters())
        self.muon, self.adam = make_optimizers(self.vae)
        self.pool = ThreadPoolExecutor(args.workers, initializer=torch.set_num_threads, initargs=(1,))
        self.crops = Crops(args.seed)
        self.phase, self.phase_step, self.phase_spent = 0, 0, 0.0
        self.step, self.spent, self.loss = 0, 0.0, float("nan")
        self.average = {name: value.clone() for name, value in self.vae.state_dict().items()}
        args.logs.mkdir(parents=True, exist_ok=True)
        self.state_file, self.curve_file = args.logs / "state.pt", args.logs / "curve.jsonl"
        if args.resume:
            self.load()
        else:
            self.curve_file.unlink(missing_ok=True)

    def load(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        self.vae.load_state_dict(state["vae"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.average = state["average"]
        self.phase, self.phase_step, self.phase_spent, self.step, self.spent, self.loss = state["progress"]

    def checkpoint(self) -> dict[str, float]:
        """Save the averaged weights, measure them as a reader will get them, and save what --resume needs."""
        figures = evaluate(save(self.average, self.args.output, getattr(torch, self.args.dtype)))
        state = {"vae": self.vae.state_dict(), "average": self.average}
        state |= {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}
        state["progress"] = (self.phase, self.phase_step, self.phase_spent, self.step, self.spent, self.loss)
        write_atomically(lambda path: torch.save(state, path), self.state_file)
        self.log(**figures)
        return figures

    def log(self, **figures: float) -> None:
        with self.curve_file.open("a") as file:
            head = {"step": self.step, "seconds": round(self.spent), "phase": self.phase, "loss": round(self.loss, 5)}
            file.write(json.dumps(head | figures) + "\n")

    def done(self) -> float:
        """Return the share of the current phase that is over, from 0 to 1."""
        phase = PHASES[self.phase]
        if self.args.minutes is None:
            return self.phase_step / (phase.steps * self.args.length)
        return self.phase_spent / (60 * self.args.minutes * phase.minutes / sum(phase.minutes for phase in PHASES))

    def gradients(self, pixels: torch.Tensor) -> tuple[float, list[torch.Tensor | None]]:
        """Compute the loss and the gradients of one worker's part of the batch."""
        loss = loss_of(self.vae, pixels.contiguous(memory_format=torch.channels_last), PHASES[self.phase].linear)
        return loss.item(), list(torch.autograd.grad(loss, self.parameters, allow_unused=True))

    def train_one(self) -> None:
        phase, done = PHASES[self.phase], self.done()
        warm = min(1.0, (self.phase_step + 1) / WARM_UP)
        main, residual = (warm * (a + (b - a) * done) for a, b in (phase.main_rates, phase.residual_rates))
        groups = (*self.muon.param_groups, *self.adam.param_groups)
        for group, rate in zip(groups, (main, residual, main * ADAM_RATE), strict=True):
            group["lr"] = rate
        parts = self.crops.batch(self.step, *phase.crops[self.step % len(phase.crops)]).chunk(self.args.workers)
        losses, gradients = zip(*self.pool.map(self.gradients, parts), strict=True)
        for parameter, *of_parts in zip(self.parameters, *gradients, strict=True):
            parameter.grad = None if of_parts[0] is None else sum(of_parts) / len(of_parts)
        self.vae.encoder.conv_out.weight.grad[CHANNELS:] = 0  # the variance stays fixed
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.muon.step()
        self.adam.step()
        self.step += 1
        self.phase_step += 1
        decay = min(EMA, self.step / (self.step + 10))
        for name, value in self.vae.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        loss = sum(losses) / len(losses)
        self.loss = loss if self.loss != self.loss else 0.98 * self.loss + 0.02 * loss

    def next_phase(self) -> None:
        """Begin the next phase: from the averaged weights, with latents made standard and with fresh optimizers."""
        self.vae.load_state_dict(self.average)
        standardise(self.vae, self.crops, PHASES[self.phase].linear, PHASES[self.phase].centre)
        self.phase, self.phase_step, self.phase_spent = self.phase + 1, 0, 0.0
        self.average = {name: value.clone() for name, value in self.vae.state_dict().items()}
        self.muon, self.adam = make_optimizers(self.vae)

    def run(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            while self.phase < len(PHASES):
                name = PHASES[self.phase].name
                bar = progress.add_task(name, total=1.0)
                while self.done() < 1:
                    began = time.monotonic()
                    self.train_one()
                    self.spent += time.monotonic() - began
                    self.phase_spent += time.monotonic() - began
                    words = f"{name}: step {self.step}, loss {self.loss:.4f}"
                    progress.update(bar, completed=self.done(), description=words)
                    if self.step % 50 == 0:
                        self.log()
                    if self.step % self.args.evaluate_every == 0:
                        progress.console.print(f"step {self.step}: loss {self.loss:.4f}, {describe(self.checkpoint())}")
                self.next_phase()
                figures = self.checkpoint()
                progress.console.print(f"after {name}: loss {self.loss:.4f}, {describe(figures)}")
        print(f"{describe(figures)}; {sum(p.numel() for p in self.parameters):,} parameters")
        print(f"{self.step} steps in {self.spent / 60:.1f} minutes, {self.args.workers} workers on {machine()}")


def machine() -> str:
    """Describe the processor and the library, for the record."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores of {model}, torch {torch.__version__}"


def describe(figures: dict[str, float]) -> str:
    pictures = ", ".join(f"{name} {figures[name]:.2f} dB" for name in HELD_OUT)
    return f"{pictures}, scaled latents {figures['latent_mean']:.3f} +- {figures['latent_std']:.3f}"


if __name__ == "__main__":
    Trainer(parse()).run()
