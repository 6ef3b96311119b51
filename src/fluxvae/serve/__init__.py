"""Serving: what runs inside Triton, what starts and watches Triton, what stands in front of it, and what calls it.

model/       Triton's Python model: it checks requests, decodes them within the memory limit, answers, and counts
triton/      finds a ``tritonserver`` and starts it
gateway/     HTTP in front of Triton, for people and for diffusers' ``remote_decode``
supervisor/  ``fluxvae serve``: starts Triton and the gateway, checks by decoding that they work, and restarts them
client/      calls Triton over gRPC, HTTP or shared memory; users import it as `fluxvae.client`
"""
