"""Files as other programs write them: their picture is their tensor's, and what they do not tell is asked for.

Every writer here keeps to the names, metadata and layout of the program's own source, which docs/latent-files.md names.
"""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from family_models import flux2_vae
from fluxvae import Decoder

from .jobs import decode, failures, files, image

LH, LW = 6, 10
FLUX2_ARCHITECTURES = ("flux_2_dev", "flux_2_klein_4b", "flux_2_klein_9b")


@pytest.fixture(scope="module")
def flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux2")
    flux2_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flux2_decoder(flux2: Path) -> Decoder:
    return Decoder.from_pretrained(flux2, device="cpu")


def one(seed: int, channels: int = 16, h: int = LH, w: int = LW) -> torch.Tensor:
    """Random latents (C, h, w) of one image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, h, w, generator=generator, dtype=torch.float32, device="cpu")


def picture(decoder: Decoder, tensor: torch.Tensor, raw: bool | None) -> np.ndarray:
    """The pixels that the library decodes latents (C, h, w) to."""
    return decoder.decode(tensor.unsqueeze(0), raw=raw, output_type="uint8")[0]


def comfyui(path: Path, samples: torch.Tensor, *, version: bool = True) -> None:
    """Write latents as ComfyUI does in ``SaveLatent.save``."""
    held = {"latent_tensor": samples.contiguous()}
    if version:
        held["latent_format_version_0"] = torch.tensor([], dtype=torch.float32, device="cpu")
    save_file(held, path, {"prompt": json.dumps({"3": {"class_type": "KSampler"}})})


def sd_scripts(path: Path, *buckets: torch.Tensor, flipped: bool = False, suffix: bool = True) -> None:
    """Write latents as sd-scripts does in ``LatentsCachingStrategy.save_latents_to_disk``."""
    held: dict[str, Any] = {}
    for latents in buckets:
        end = f"_{latents.shape[-2]}x{latents.shape[-1]}" if suffix else ""
        held["latents" + end] = latents.float().numpy()
        held["original_size" + end] = np.array((1000, 700))
        held["crop_ltrb" + end] = np.array((0, 0, 80, 48))
        if flipped:
            held["latents_flipped" + end] = latents.flip(2).float().numpy()
        held["alpha_mask" + end] = np.ones(latents.shape[-2:], np.float32)
    np.savez(path, **held)


def musubi(path: Path, held: dict[str, torch.Tensor], architecture: str) -> None:
    """Write latents as musubi-tuner does (``save_latent_cache_common``), with the original picture's size."""
    metadata = {"architecture": architecture, "width": "1000", "height": "700", "format_version": "1.0.1"}
    save_file(held, path, metadata)


def ai_toolkit(path: Path, latent: torch.Tensor, space: str) -> None:
    """Write latents as ai-toolkit does in ``LatentCachingMixin._cache_one_latent``."""
    info = {"filename": "cat.jpg", "scale_to_width": "80", "crop_x": "0", "latent_version": "1", "format": "pt"}
    save_file({"latent": latent}, path, info | {"latent_space_version": space})


def onetrainer(path: Path, **latents: torch.Tensor) -> None:
    """Write latents as OneTrainer does with mgds' ``DiskCache``: one item of its split names."""
    torch.save(latents | {"original_resolution": (700, 1000), "crop_offset": (0, 3)}, path)


def test_a_folder_of_every_program(tmp_path: Path, demo: Decoder) -> None:
    """One job needs no flags to decode a folder of all files that trainers and ComfyUI write for FLUX.1."""
    made = {index: one(index) for index in range(12)}
    there = tmp_path / "in"
    there.mkdir()
    expected = {}
    comfyui(there / "ComfyUI_00001_.latent", torch.stack([made[0], made[1]]))
    expected |= {f"ComfyUI_00001__000{row}": (made[row], True) for row in (0, 1)}
    sd_scripts(there / "cat_0080x0048_flux.npz", made[2], one(20, h=8, w=4), flipped=True)
    expected |= {
        "cat_0080x0048_flux_6x10": (made[2], False),
        "cat_0080x0048_flux_6x10_flipped": (made[2].flip(2), False),
        "cat_0080x0048_flux_8x4": (one(20, h=8, w=4), False),
        "cat_0080x0048_flux_8x4_flipped": (one(20, h=8, w=4).flip(2), False),
    }
    sd_scripts(there / "old_flux.npz", made[3], flipped=True, suffix=False)
    expected |= {"old_flux": (made[3], False), "old_flux_flipped": (made[3].flip(2), False)}
    held = {"latents_6x10_bfloat16": made[4].bfloat16(), "latents_flipped_6x10_bfloat16": made[4].flip(2).bfloat16()}
    musubi(there / "new_0080x0048_flux.safetensors", held, "flux")  # sd-scripts' branch new_cache has musubi's names
    expected |= {
        "new_0080x0048_flux": (made[4].bfloat16(), False),
        "new_0080x0048_flux_flipped": (made[4].flip(2).bfloat16(), False),
    }
    held = {"latents_1x6x10_float32": made[5], "latents_control_1x8x4_float32": one(21, h=8, w=4)}
    musubi(there / "dog_0080x0048_fk.safetensors", held, "flux_kontext")
    expected |= {"dog_0080x0048_fk": (made[5], False), "dog_0080x0048_fk_control": (one(21, h=8, w=4), False)}
    musubi(there / "zi.safetensors", {"latents_1x6x10_float32": made[6]}, "z_image")
    expected["zi"] = (made[6], True)
    (there / "_latent_cache").mkdir()
    ai_toolkit(there / "_latent_cache/cat_hash.safetensors", made[7].bfloat16(), "flux1")
    expected["_latent_cache/cat_hash"] = (made[7].bfloat16(), False)
    for index, borrower in enumerate(("flux_kontext", "chroma", "zimage", "hidream"), 30):
        ai_toolkit(there / f"_latent_cache/{borrower}.safetensors", one(index), borrower)
        expected[f"_latent_cache/{borrower}"] = (one(index), False)
    onetrainer(
        there / "0.pt", latent_image=made[8].bfloat16(), latent_mask=one(8)[:1], latent_conditioning_image=made[9]
    )
    expected |= {"0": (made[8].bfloat16(), True), "0_conditioning": (made[9], True)}
    torch.save(made[11], there / "simpletuner.pt")
    expected["simpletuner"] = (made[11], False)
    comfyui(there / "frame.latent", made[10].reshape(1, 16, 1, LH, LW))
    expected["frame"] = (made[10], True)
    # These files lie beside the latents and hold none.
    torch.save([{"crop_resolution": (48, 80), "image_path": "cat.jpg"}], there / "aggregate.pt")
    torch.save({"tokens_1": one(1), "tokens_mask_1": one(2)}, there / "1.pt")
    save_file({"varlen_t5_bfloat16": one(3)}, there / "dog_fk_te.safetensors", {"architecture": "a", "caption1": "dog"})
    np.savez(there / "cat_flux_te.npz", l_pooled=np.ones(3), t5_out=np.ones(3), txt_ids=np.ones(3))

    done = decode(there, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["decoded"], told["skipped"]) == (len(expected), 4)
    assert files(tmp_path / "out") == {f"{name}.png" for name in expected} | {"job.json"}
    for name, (tensor, raw) in expected.items():
        assert np.array_equal(image(tmp_path / f"out/{name}.png"), picture(demo, tensor, raw)), name
        assert not np.array_equal(picture(demo, tensor, raw), picture(demo, tensor, not raw)), "raw changes nothing"


def test_a_folder_of_flux2(tmp_path: Path, flux2: Path, flux2_decoder: Decoder) -> None:
    """The same for FLUX.2, of which all write normalised patches but OneTrainer, which keeps what the VAE encoded."""
    there = tmp_path / "in"
    there.mkdir()
    expected: dict[str, tuple[torch.Tensor, bool]] = {}
    patches = {index: one(index, 128, 3, 5) for index in range(8)}
    comfyui(there / "comfy.latent", patches[0].unsqueeze(0))
    expected["comfy"] = (patches[0], False)
    for index, architecture in enumerate(FLUX2_ARCHITECTURES, 1):
        held = {"latents_3x5_float32": patches[index], "latents_control_0_3x5_float32": patches[0]}
        musubi(there / f"{architecture}.safetensors", held, architecture)
        expected |= {architecture: (patches[index], False), f"{architecture}_control_0": (patches[0], False)}
    for index, space in ((4, "flux2"), (5, "flux2_klein_4b"), (6, "flux2_klein_9b")):
        ai_toolkit(there / f"{space}.safetensors", patches[index], space)
        expected[space] = (patches[index], False)
    torch.save(patches[7].clone(), there / "simpletuner.pt")
    expected["simpletuner"] = (patches[7], False)
    packed = io.BytesIO()
    torch.save(patches[6].clone(), packed)
    (there / "compressed.pt").write_bytes(gzip.compress(packed.getvalue()))
    expected["compressed"] = (patches[6], False)
    onetrainer(there / "0.pt", latent_image=one(9, 32))
    expected["0"] = (one(9, 32), True)
    done = decode(there, "-o", tmp_path / "out", "--checkpoint", flux2)
    assert done.exit_code == 0, done.output
    assert files(tmp_path / "out") == {f"{name}.png" for name in expected} | {"job.json"}
    for name, (tensor, raw) in expected.items():
        assert np.array_equal(image(tmp_path / f"out/{name}.png"), picture(flux2_decoder, tensor, raw)), name


def test_what_is_not_told_is_asked_for(tmp_path: Path, demo: Decoder) -> None:
    there = tmp_path / "in"
    there.mkdir()
    comfyui(there / "old.latent", one(2).unsqueeze(0), version=False)
    sd_scripts(there / "renamed.npz", one(3))
    ai_toolkit(there / "sd3.safetensors", one(4), "sd3")
    musubi(there / "unknown.safetensors", {"latents_1x6x10_float32": one(5)}, "kandinsky5")
    names = {"old": 2, "renamed": 3, "sd3": 4, "unknown": 5}
    assert decode(there, "-o", tmp_path / "out").exit_code == 6
    told = {Path(line["source"]).stem: line["message"] for line in failures(tmp_path / "out")}
    assert told.keys() == names.keys()
    for name, message in told.items():
        assert message.startswith("raw: "), name
        assert message.endswith("pass --raw or --no-raw"), name
    assert "SD before May 2023" in told["old"]
    assert "scaled it for SD3 (scaling_factor 1.5305), and this checkpoint's scaling_factor is 0.3611" in told["sd3"]
    assert "'kandinsky5'" in told["unknown"]
    for flag, raw in (("--raw", True), ("--no-raw", False)):
        assert decode(there, "-o", tmp_path / flag, flag).exit_code == 0
        for name, seed in names.items():
            assert np.array_equal(image(tmp_path / f"{flag}/{name}.png"), picture(demo, one(seed), raw)), name


def test_one_image_without_its_batch(tmp_path: Path, demo: Decoder) -> None:
    """Latents (C, h, w) that look like packed rows by their last side are one image if the size says so."""
    there = tmp_path / "in"
    there.mkdir()
    plain, wide = one(1), one(2, h=2, w=64)
    np.save(there / "npy.npy", plain.numpy())
    np.savez(there / "npz.npz", latents=plain.numpy())
    save_file({"latents": plain}, there / "st.safetensors")
    torch.save({"latents": plain}, there / "pt.pt")
    torch.save({"latents": plain.reshape(1, 16, 1, LH, LW)}, there / "frame.pt")
    save_file({"latents": wide}, there / "wide.safetensors", {"height": "16", "width": "512"})
    save_file({"latents": wide}, there / "rows.safetensors", {"height": "16", "width": "32"})
    save_file({"latents": wide}, there / "either.safetensors")
    save_file({"latents": wide}, there / "neither.safetensors", {"height": "64", "width": "64"})
    torch.save({"latents": torch.stack([plain, plain], 1).unsqueeze(0)}, there / "video.pt")
    assert decode(there, "-o", tmp_path / "out").exit_code == 6
    for name in ("npy", "npz", "st", "pt", "frame"):
        assert np.array_equal(image(tmp_path / f"out/{name}.png"), picture(demo, plain, None)), name
    assert np.array_equal(image(tmp_path / "out/wide.png"), picture(demo, wide, None))
    for row in range(16):
        packed = demo.decode(wide[row : row + 1], height=16, width=32, output_type="uint8")[0]
        assert np.array_equal(image(tmp_path / f"out/rows_{row:04d}.png"), packed)
    told = {Path(line["source"]).name: line["message"] for line in failures(tmp_path / "out")}
    assert told.keys() == {"either.safetensors", "neither.safetensors", "video.pt"}
    assert "one image of 16x512 (height x width) without its batch" in told["either.safetensors"]
    assert "16 packed images" in told["either.safetensors"]
    assert "pass height and width" in told["either.safetensors"]
    assert "got 64x64 (height x width)" in told["neither.safetensors"]
    assert "a video of 2 frames" in told["video.pt"]
