"""Jobs over many latents: files in, files out, on one machine or many.

    from fluxvae.batch import Job, decode_files

    report = decode_files(Job(inputs=("latents/",), out="images/", checkpoint="ae.safetensors", existing="resume"))

`decode_files_on_ray` does the same job on a Ray cluster. ``fluxvae decode`` is both on the command line.
"""

from __future__ import annotations

from fluxvae.batch.items import Failure, Item, Result
from fluxvae.batch.ray_job import decode_files_on_ray
from fluxvae.batch.run import Outlook, Report, Watcher, decode_files
from fluxvae.batch.settings import Job

__all__ = ["Failure", "Item", "Job", "Outlook", "Report", "Result", "Watcher", "decode_files", "decode_files_on_ray"]
