"""``python -m fluxvae.cli``."""

from fluxvae.cli import main

main()
