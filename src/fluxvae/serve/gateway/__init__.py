"""The HTTP gateway in front of Triton. `app` puts it together, and ``python -m fluxvae.serve.gateway`` runs it."""
