"""Jobs over many files: latents to images and pictures to latents, on one machine or on many.

    from fluxvae.batch import EncodeJob, Job, decode_files, encode_files

    encode_files(EncodeJob(inputs=("photographs/",), out="latents/", checkpoint="ae.safetensors", sizes="buckets"))
    report = decode_files(Job(inputs=("latents/",), out="images/", checkpoint="ae.safetensors", existing="resume"))

`decode_files_on_ray` and `encode_files_on_ray` do the same jobs on a Ray cluster. On the command line
``fluxvae decode`` and ``fluxvae encode`` offer both.
"""

from __future__ import annotations

from fluxvae.batch.encode_settings import EncodeJob
from fluxvae.batch.items import Failure, Item, Result
from fluxvae.batch.outlook import Outlook, Report, Watcher
from fluxvae.batch.ray_job import decode_files_on_ray, encode_files_on_ray
from fluxvae.batch.run import decode_files, encode_files
from fluxvae.batch.settings import Job

__all__ = [
    "EncodeJob",
    "Failure",
    "Item",
    "Job",
    "Outlook",
    "Report",
    "Result",
    "Watcher",
    "decode_files",
    "decode_files_on_ray",
    "encode_files",
    "encode_files_on_ray",
]
