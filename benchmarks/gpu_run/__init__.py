"""What `benchmarks/gpu.py` does on a card, part by part. Begin with `parts`, which lists them in their order."""
