"""Serving: the Triton server, and what its model needs beside the decoder."""
