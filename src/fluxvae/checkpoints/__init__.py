"""Turns every kind of checkpoint into one of diffusers' autoencoders, or raises a `CheckpointError` saying what to do.

A source passes through these modules, each of which turns one thing into the next:

    find.py      a source (a path, a hub id) -> the files that are there; folders.py knows how diffusers names files,
                 and hub.py is the only part that may use a network
    files.py     files -> names, shapes and dtypes of tensors, and the tensors that are asked for; safetensors_file.py
                 and torch_file.py read the two kinds of file
    layouts.py   names of tensors (BFL's, old ones, behind prefixes) -> diffusers' names; wan.py has Wan's names, and
                 strangers.py names the VAEs that are not decoded here
    fp8.py       scaled 8-bit weights -> the weights they stand for
    config.py    the shapes of the tensors -> the config of the VAE; defaults.py completes a config
    families.py  which model's VAE it is, which decides what no tensor says: above all the factors of its latents
    identify.py  the config and the family together, and what they were told by
    outline.py   the config -> the shapes of all tensors and the layers, without PyTorch or diffusers
    module.py    the config -> diffusers' module, in which every tensor has its place; previews.py has TAEF2's blocks
    load.py      all of these in turn: `open_checkpoint`, `load_vae`

Importing this package imports neither PyTorch nor diffusers, because that takes seconds: each function imports what it
needs when it is called.
"""

from fluxvae.checkpoints.find import ASSETS
from fluxvae.checkpoints.load import AssumedFamilyWarning, Checkpoint, load_vae, open_checkpoint, weights_files

__all__ = ["ASSETS", "AssumedFamilyWarning", "Checkpoint", "load_vae", "open_checkpoint", "weights_files"]
