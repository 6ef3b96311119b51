"""The outlines are diffusers' modules in everything that is read of them: tensors, layers, formats, defaults."""

from __future__ import annotations

import inspect
import json
from typing import Any

import diffusers
import pytest
import torch

from fluxvae.checkpoints.defaults import DEFAULTS
from fluxvae.checkpoints.module import own_settings
from fluxvae.checkpoints.outline import outline
from fluxvae.engine.network import read_network
from fluxvae.engine.way import DECODE, ENCODE, Way
from fluxvae.latents.format import LatentFormat

FLUX = {"block_out_channels": [32, 64, 96, 96], "up_block_types": ["UpDecoderBlock2D"] * 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "latent_channels": 16}  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    {"_class_name": "AutoencoderKL", **FLUX, "layers_per_block": 2, "use_post_quant_conv": False, "shift_factor": 0.1},
    {"_class_name": "AutoencoderKL", **FLUX, "mid_block_add_attention": False, "norm_num_groups": 16},
    {"_class_name": "AutoencoderKL"},
    {"_class_name": "AutoencoderKLFlux2", "block_out_channels": [32, 32, 64, 64], "batch_norm_eps": 1e-3},
    {
        "_class_name": "AutoencoderKLFlux2",
        **FLUX,
        "latent_channels": 32,
        "decoder_block_out_channels": [32, 32, 64, 96],
    },
    {"_class_name": "AutoencoderKLQwenImage", "base_dim": 16, "input_channels": 4},
    {"_class_name": "AutoencoderKLWan", "base_dim": 16, "decoder_base_dim": 24, "num_res_blocks": 1},
    {
        "_class_name": "AutoencoderKLWan",
        "base_dim": 16,
        "dim_mult": [1, 3, 4],
        "temperal_downsample": [True, False],
        "scale_factor_spatial": 4,
    },
    {"_class_name": "AutoencoderTiny", "latent_channels": 16, "block_out_channels": [64] * 4},
    {"_class_name": "AutoencoderTiny", "num_decoder_blocks": [2, 1, 1], "decoder_block_out_channels": [16] * 3},
]
SETTINGS = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config['_class_name']}-{len(config)}")


def real(config: dict[str, Any]) -> Any:
    config = {
        name: value for name, value in config.items() if name != "block_out_channels" or "KL" in config["_class_name"]
    }
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(json.loads(json.dumps(config))).eval()


def shapes_of(module: Any, way: Way = DECODE) -> dict[str, tuple[int, ...]]:
    other = ENCODE if way == DECODE else DECODE
    return {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if not name.startswith(tuple(f"{part}." for part in other.parts))
    }


def records(value: Any) -> Any:
    """A network's records without the modules."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: records(getattr(value, name)) for name in value.__dataclass_fields__ if name != "module"}
    return [type(value).__name__, *map(records, value)] if isinstance(value, tuple) else value


@SETTINGS
@pytest.mark.parametrize("way", [DECODE, ENCODE], ids=["decode", "encode"])
def test_an_outline_has_the_tensors_and_layers_of_the_real_module(config: dict[str, Any], way: Way) -> None:
    made, module = outline(config, way), real(config)
    assert made is not None
    assert made.shapes == shapes_of(module, way)
    assert str(LatentFormat.from_config(made.config, config["_class_name"])) == str(LatentFormat.from_vae(module))
    if "Tiny" in config["_class_name"]:
        assert made.network is None
    else:
        assert records(made.network) == records(read_network(module.to_empty(device="cpu"), way))


@SETTINGS
def test_a_format_that_was_read_from_a_config_is_the_modules(config: dict[str, Any]) -> None:
    made, module = outline(config), real(config)
    assert made is not None
    found, expected = LatentFormat.from_config(made.config, config["_class_name"]), LatentFormat.from_vae(module)
    assert (found.batch_norm and found.batch_norm.eps) == (expected.batch_norm and expected.batch_norm.eps)
    for name in set(LatentFormat.__dataclass_fields__) - {"batch_norm"}:
        assert getattr(found, name) == getattr(expected, name), name


def test_taef2s_pools_have_places() -> None:
    from fluxvae.checkpoints.previews import add_pools

    config = {"_class_name": "AutoencoderTiny", "latent_channels": 32, "num_decoder_blocks": [3, 2, 1, 1]}
    for way in (DECODE, ENCODE):
        module = real(config)
        with own_settings(), torch.device("meta"):
            add_pools(module, way)
        made = outline(config, way, pools=True)
        assert made is not None
        assert made.shapes == shapes_of(module, way)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_are_diffusers(kind: str) -> None:
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    assert DEFAULTS[kind] == {name: one.default for name, one in parameters.items() if name != "self"}


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "gelu"},
        {"up_block_types": ["AttnUpDecoderBlock2D"] * 4},
        {"up_block_types": None},
        {"something_new": 1},
        {"norm_num_groups": 7},
        {"_class_name": "AutoencoderDC"},
        {"layers_per_block": "2"},
    ],
)
def test_what_is_not_known_has_no_outline(change: dict[str, Any]) -> None:
    assert outline(CONFIGS[0] | change) is None
