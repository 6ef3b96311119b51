"""Forks after PyTorch has computed or has not, decodes in each child, and prints how each decode ended, as JSON.

Before the fork, the process ran one of these:

- ``nothing``;
- ``thread``: an operation of two threads, in a thread that has ended by then;
- ``parallel``: an operation of two threads, in the thread that forks.

After the fork, the child does one of these:

- ``same``: it decodes at once;
- ``one``: it decodes with one thread (torch.set_num_threads(1));
- ``thread``: it decodes in a thread of its own;
- ``computes``: it runs an operation of two threads first;
- ``loads``: it loads the demo checkpoint first.

The decode ends as ``equal`` or ``different`` (compared with the right image), with the child's error, or it ``hangs``.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from fluxvae import Decoder

ENGINES = ("torch", "winograd", "diffusers", "preview")
DEADLINE_S = 45.0


def parallel() -> None:
    torch.zeros(1 << 20, dtype=torch.float32, device="cpu").add_(1)


def in_thread(function: Any) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def make(engine: str) -> Decoder:
    torch.manual_seed(0)
    if engine == "preview":
        return Decoder(AutoencoderTiny(latent_channels=16, decoder_block_out_channels=(16,) * 4).eval())
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
    ).eval()
    return Decoder(vae, engine="diffusers") if engine == "diffusers" else Decoder(vae, kernels=engine)


def child(decoder: Decoder, latents: torch.Tensor, how: str, expected: torch.Tensor) -> str:
    if how == "one":
        torch.set_num_threads(1)
    if how == "computes":
        parallel()
    said = []

    def decode() -> None:
        try:
            if how == "loads":
                Decoder.from_pretrained("demo", device="cpu")
            image = decoder.decode(latents, output_type="pt")
            said.append("equal" if torch.equal(image, expected) else "different")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")

    in_thread(decode) if how == "thread" else decode()
    return said[0]


def fork(decoder: Decoder, latents: torch.Tensor, how: str, expected: torch.Tensor) -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, child(decoder, latents, how, expected).encode())
        finally:
            os._exit(0)
    os.close(write)
    return pid, read


def wait(pid: int, read: int) -> str:
    deadline = time.monotonic() + DEADLINE_S
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs"
        time.sleep(0.01)
    return os.read(read, 10000).decode()


def main() -> None:
    torch.set_num_threads(1)
    latents = torch.randn(1, 16, 16, 16, dtype=torch.float32, device="cpu")
    decoders = {engine: make(engine) for engine in ENGINES}
    images = {engine: decoder.decode(latents, output_type="pt") for engine, decoder in decoders.items()}
    torch.set_num_threads(2)
    cases = [("nothing", engine, "same") for engine in ENGINES]
    cases += [("nothing", "torch", "computes"), ("thread", "torch", "computes")]
    cases += [("parallel", engine, how) for engine in ENGINES for how in ("same", "one")]
    cases += [("parallel", "torch", "thread"), ("parallel", "torch", "loads")]
    found = {}
    for stage, run in {"nothing": lambda: None, "thread": lambda: in_thread(parallel), "parallel": parallel}.items():
        run()
        children = {
            (engine, how): fork(decoders[engine], latents, how, images[engine])
            for before, engine, how in cases
            if before == stage
        }
        found |= {f"{stage} {engine} {how}": wait(*ends) for (engine, how), ends in children.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
