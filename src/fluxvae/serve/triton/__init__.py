"""Runs a ``tritonserver`` of one's own: finds the program, model folders and free ports, and starts and stops it."""
