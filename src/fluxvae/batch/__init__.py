"""Jobs that decode many files of latents to files of images, on one machine or on many.

    from fluxvae.batch import Job, decode_files

    report = decode_files(Job(inputs=("latents/",), out="images/", checkpoint="ae.safetensors", existing="resume"))

`decode_files_on_ray` does the same job on a Ray cluster. On the command line ``fluxvae decode`` offers both.
"""

from __future__ import annotations

from fluxvae.batch.items import Failure, Item, Result
from fluxvae.batch.ray_job import decode_files_on_ray
from fluxvae.batch.run import Outlook, Report, Watcher, decode_files
from fluxvae.batch.settings import Job

__all__ = ["Failure", "Item", "Job", "Outlook", "Report", "Result", "Watcher", "decode_files", "decode_files_on_ray"]
