"""What `benchmarks/gpu.py` does on a card, part by part. Start with `parts`, which says what there is in which order."""
