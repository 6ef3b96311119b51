"""``python -m fluxvae.serve.gateway``: see `command`."""

import sys

from fluxvae.serve.gateway.command import main

if __name__ == "__main__":
    sys.exit(main())
