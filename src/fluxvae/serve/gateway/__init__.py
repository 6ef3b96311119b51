"""The HTTP gateway in front of Triton. `app` puts it together, and `command` runs it."""
