"""Clients of the Triton model; `fluxvae.client` exports what is public."""
