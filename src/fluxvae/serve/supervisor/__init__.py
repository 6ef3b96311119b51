"""The supervisor behind ``fluxvae serve``: it starts Triton and the gateway, watches, restarts and stops them.

It watches Triton by decoding, because Triton says that it is ready even while the Python process of a model is dead.
"""
