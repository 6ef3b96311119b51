"""The reference engine gives the same bits as the real pipelines of models that borrow FLUX's autoencoders.

The transformers are tiny and random, and the prompt embeddings are given; everything else is the pipelines' own code.
The models' own weights and text encoders are not covered here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from borrower_pipelines import BORROWERS, build, run
from family_models import flux2_vae
from fluxvae import Decoder
from models import random_vae

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
UNPACKED = ("Lumina2", "HiDream")
SIZES = {"HiDream": [(4, 4, 1), (2, 2, 2)]}  # it makes its pictures' area its own, in multiples of 16 only if square


@DTYPES
@pytest.mark.parametrize("name", [name for name in BORROWERS if name != "ERNIE"])
def test_borrowers_of_flux1(name: str, dtype: torch.dtype) -> None:
    pipe = build(name, random_vae(dtype=dtype))
    options = {"rescale_dtype": "float32"} if name == "Bria" else {}
    decoder = Decoder(pipe.vae, engine="diffusers", **options)
    for gh, gw, batch in SIZES.get(name, [(3, 5, 1), (4, 2, 2)]):
        height, width = 16 * gh, 16 * gw
        latents = run(name, pipe, height, width, batch, "latent")
        unpacked = name in UNPACKED
        assert latents.shape == ((batch, 16, 2 * gh, 2 * gw) if unpacked else (batch, gh * gw, 64))
        size = {} if unpacked else {"height": height, "width": width}
        expected = run(name, pipe, height, width, batch, "pt")
        assert torch.equal(decoder.decode(latents, output_type="pt", **size), expected)
        assert np.array_equal(
            decoder.decode(latents, output_type="uint8", **size),
            np.stack([np.asarray(picture) for picture in run(name, pipe, height, width, batch, "pil")]),
        )
    if name == "Bria" and dtype == torch.bfloat16:
        plain = Decoder(pipe.vae, engine="diffusers")
        assert not torch.equal(plain.decode(latents, output_type="pt", **size), expected), "where it casts shows"


@DTYPES
def test_ernie_image(dtype: torch.dtype) -> None:
    """FLUX.2's VAE, latents in patches; its pipeline's eps is its own, whatever the config says."""
    vae = flux2_vae(dtype=dtype)
    pipe, decoder = build("ERNIE", vae), Decoder(vae, engine="diffusers")
    assert vae.config.batch_norm_eps != 1e-5
    for gh, gw, batch in [(3, 5, 1), (4, 2, 2)]:
        latents = run("ERNIE", pipe, 16 * gh, 16 * gw, batch, "latent")
        assert latents.shape == (batch, 128, gh, gw)
        expected = run("ERNIE", pipe, 16 * gh, 16 * gw, batch, "pt")
        assert torch.equal(decoder.decode(latents, output_type="pt", batch_norm_eps=1e-5), expected)
        assert not torch.equal(decoder.decode(latents, output_type="pt"), expected), "the config's eps is another"


@pytest.mark.parametrize(("of_vae", "of_transformer"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_longcat_rescales_in_the_dtype_of_its_transformer(of_vae: str, of_transformer: str) -> None:
    vae = random_vae(dtype=getattr(torch, of_vae))
    pipe = build("LongCat", vae, getattr(torch, of_transformer))
    latents, expected = (run("LongCat", pipe, 48, 80, 1, kind) for kind in ("latent", "pt"))
    assert str(latents.dtype) == f"torch.{of_transformer}"
    size: dict[str, Any] = {"height": 48, "width": 80, "output_type": "pt"}
    decoder = Decoder(vae, engine="diffusers", rescale_dtype=of_transformer)
    assert torch.equal(decoder.decode(latents, **size), expected)
    assert not torch.equal(Decoder(vae, engine="diffusers").decode(latents, **size), expected), "where it casts shows"
