"""Every kind of checkpoint to one of diffusers' autoencoders, or a `CheckpointError` that says what to do.

    find.py      a source (a path, a hub id) -> the files that are there; folders.py has diffusers' names of files,
                 hub.py is the part that may use a network
    files.py     files -> names, shapes and dtypes of tensors, and the tensors that are asked for; safetensors_file.py
                 and torch_file.py are the two kinds
    layouts.py   names of tensors (BFL's, old ones, behind prefixes) -> diffusers' names
    fp8.py       scaled 8-bit weights -> the weights they stand for
    config.py    the shapes of the tensors -> the config of the VAE
    families.py  which model's VAE it is: what no tensor says, above all the factors of its latents
    module.py    the config -> diffusers' module, in which every tensor has its place; previews.py has TAEF2's blocks
    load.py      all of these in turn: `open_checkpoint`, `load_vae`

Importing this imports neither PyTorch nor diffusers: each function imports what it needs when it is called.
"""

from fluxvae.checkpoints.find import ASSETS
from fluxvae.checkpoints.load import AssumedFamilyWarning, Checkpoint, load_vae, open_checkpoint, weights_files

__all__ = ["ASSETS", "AssumedFamilyWarning", "Checkpoint", "load_vae", "open_checkpoint", "weights_files"]
