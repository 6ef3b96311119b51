"""Serving: what runs inside Triton, what starts and watches it, what stands in front of it, and what calls it.

model/       Triton's Python model: requests to jobs, jobs to decodes within the memory limit, answers, metrics
triton/      find and start a ``tritonserver``
gateway/     HTTP for people and for diffusers' ``remote_decode``
supervisor/  ``fluxvae serve``: starts both, decodes to see that they live, restarts
client/      calls Triton over gRPC, HTTP or shared memory; `fluxvae.client` is its public face
"""
