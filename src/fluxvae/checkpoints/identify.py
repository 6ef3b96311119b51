"""Finds out what a checkpoint is: its config, whose VAE it is, and which source that knowledge comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fluxvae.checkpoints.config import PICTURES, config_of_shapes, describe, fits
from fluxvae.checkpoints.defaults import DEFAULTS
from fluxvae.checkpoints.families import FACTORS, Choice, choose_family, told_by_neighbours, wanted_factor
from fluxvae.checkpoints.files import Weights
from fluxvae.checkpoints.layouts import MOST_LEVELS, Vae
from fluxvae.checkpoints.local import Found
from fluxvae.errors import CheckpointError, InvalidOptionError

__all__ = ["assumption", "identify"]

_MOST_BLOCKS = 64
"""The most residual blocks that a config may claim for a level: many times those of any autoencoder there is."""
_MOST_WIDTH = 2**14
"""The most channels that a config may claim for a layer: some times those of any autoencoder there is."""


def identify(
    found: Found, weights: Weights, vae: Vae, named: Any, given: dict[str, float], where: str
) -> tuple[dict[str, Any], Choice | None, str]:
    """Find the config of a checkpoint and, where a config.json does not settle it, whose VAE it is.

    A config.json that belongs to the weights, or that fits a single file it lies beside, is taken as it is. Without
    one, the shapes of the tensors give the sizes and the family gives the factors.

    Args:
        found: the files and configs of the source.
        weights: their headers.
        vae: the decoder among their tensors.
        named: the `Family` that the caller named, if any.
        given: the factors that the caller gave. They replace those of the config or the family.
        where: the checkpoint, for messages.

    Returns:
        The config; the choice of a family, None where a config.json made it needless; and, in words, what all this
        was told by.

    Raises:
        CheckpointError: no family fits the file, or the config holds numbers that no model has.
        InvalidOptionError: the named family does not fit, or a factor was given that this class has no place for.
    """
    config = found.config
    if config is None and found.beside is not None and fits(found.beside, vae):
        config = found.beside
    told_by = "config.json" if found.config is not None else "the config.json beside it"
    choice: Choice | None = None
    if config is None:
        config, families = config_of_shapes(vae, where)
        told = told_by_neighbours(weights.entries)
        factors = FACTORS[config["_class_name"]]
        choice = choose_family(families, told, named, given, factors=factors, where=where, is_=describe(vae))
        if choice.family is not None and not vae.preview:
            config |= choice.family.config
        told_by = {
            "shapes": "the shapes of its tensors",
            "neighbours": "the model in the same file",
            "family": "family=",
            "factors": "the factors that were given",
            "assumed": "an assumption",
        }[choice.told_by]
        if given and choice.told_by != "factors":
            told_by += ", and the factors that were given"
    else:
        config = dict(config)
        if named is not None:
            _, families = config_of_shapes(vae, where)
            factors = FACTORS[config["_class_name"]]
            choice = choose_family(families, None, named, given, factors=factors, where=where, is_=describe(vae))
            config |= (
                {} if vae.preview else {name: value for name, value in named.config.items() if name != "sample_size"}
            )
        options = [*(["family="] if named is not None else []), *(["the factors that were given"] if given else [])]
        told_by = f"{told_by}; its factors: {' and '.join(options)}" if options else told_by
    _check_given(config["_class_name"], given, where)
    _check_numbers(config | given, where)
    return config | given, choice, told_by


def _check_given(model: str, given: dict[str, float], where: str) -> None:
    """Refuse factors that this class of VAE has no place for."""
    own = " and ".join(FACTORS[model] or ("latents_mean", "latents_std"))
    for name in given:
        if name not in FACTORS[model]:
            raise InvalidOptionError(
                f"{name}: got {given[name]:g} for {where}, which is {model} and has {own}; leave it out"
            )


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that would take for ever to build, and factors that would turn every image into NaN."""

    def wrong(name: str, expected: str) -> None:
        raise CheckpointError(
            f"checkpoint: {where}: config.json has {name} {config[name]!r:.60}, expected {expected}; it is damaged, or "
            "was written by hand: download it again"
        )

    for name in ("layers_per_block", "num_decoder_blocks", "num_encoder_blocks", "num_res_blocks"):
        counts = config.get(name)
        counts = counts if isinstance(counts, list) else [counts]
        if any(isinstance(count, (int, float)) and not count <= _MOST_BLOCKS for count in counts):
            wrong(name, f"at most {_MOST_BLOCKS} for a level")
    for name in ("block_out_channels", "decoder_block_out_channels", "encoder_block_out_channels", "dim_mult"):
        widths = config.get(name)
        if isinstance(widths, list) and len(widths) > MOST_LEVELS:
            wrong(name, f"at most {MOST_LEVELS} levels")
    for name in ("scaling_factor", "shift_factor", "batch_norm_eps"):
        if config.get(name) is not None and (wanted := wanted_factor(name, config[name])):
            wrong(name, wanted)
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        if values is not None and (
            not isinstance(values, (list, tuple)) or any(wanted_factor(name, value) for value in values)
        ):
            wrong(name, "a list of finite numbers")
        if values is not None and name == "latents_std" and 0 in values:
            wrong(name, "numbers other than 0")
    if not FACTORS[config["_class_name"]]:
        _check_frames({**DEFAULTS[config["_class_name"]], **config}, wrong)


def _check_frames(config: Mapping[str, Any], wrong: Callable[[str, str], None]) -> None:
    """Do what `_check_numbers` does for Qwen-Image's and Wan's classes, whose settings must fit each other.

    Args:
        config: the config with diffusers' defaults for what it leaves out.
        wrong: refuses a setting of this config; it is given what was expected.
    """
    for name in ("base_dim", "decoder_base_dim", "z_dim"):
        count = config.get(name)
        if count is not None and not (type(count) is int and 0 < count <= _MOST_WIDTH):
            wrong(name, f"a number of channels from 1 to {_MOST_WIDTH}")
    factors, timed = config["dim_mult"], config["temperal_downsample"]
    if not isinstance(factors, (list, tuple)) or not all(
        type(one) is int and 0 < one <= _MOST_BLOCKS for one in factors
    ):
        wrong("dim_mult", f"a list of factors from 1 to {_MOST_BLOCKS}, one for each level")
    if type(config["num_res_blocks"]) is not int or config["num_res_blocks"] < 1:
        wrong("num_res_blocks", "a number of blocks from 1")
    if not isinstance(timed, (list, tuple)) or len(timed) != len(factors) - 1:
        wrong("temperal_downsample", f"{len(factors) - 1} of them, one less than there are levels in dim_mult")
    for name in ("input_channels", "in_channels", "out_channels"):
        if name in config and config[name] not in PICTURES:
            wrong(name, "3 (RGB) or 4 (RGBA)")
    for name in ("latents_mean", "latents_std"):
        if config[name] is None or len(config[name]) != config["z_dim"]:
            wrong(name, f"{config['z_dim']} numbers, as many as z_dim")
    if config.get("scale_factor_spatial", 2 ** (len(factors) - 1)) != 2 ** (len(factors) - 1):
        wrong("scale_factor_spatial", f"{2 ** (len(factors) - 1)} for {len(factors)} levels")


def assumption(choice: Choice | None, vae: Vae, where: str) -> str:
    """Say in a sentence which family was assumed and how to name another; empty where nothing was assumed."""
    if choice is None or choice.told_by != "assumed" or choice.family is None:
        return ""
    first = choice.family
    if vae.preview:
        return (
            f"{where} does not tell whose latents this preview is for; {first.name!r} ({first.models}) is assumed. "
            f"Others look the same: {', '.join(f'{one.name} ({one.models})' for one in choice.others)}. "
            f"family={first.name!r}, or another, says which it is"
        )
    factors = "batch_norm_eps" if first.batch_norm_eps is not None else "scaling_factor"
    factors += " and shift_factor" if first.shift_factor is not None else ""
    others = "; ".join(f"{one.name} ({one.models}): {one.formula}" for one in choice.others)
    return (
        f"{where} does not tell whose VAE it is; {first.name!r} ({first.models}) is assumed: {first.formula}. Others "
        f"have the same tensors: {others}. family={first.name!r}, or another, says which it is; or give {factors}"
    )
