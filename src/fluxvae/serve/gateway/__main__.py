"""``python -m fluxvae.serve.gateway``: see `app`."""

import sys

from fluxvae.serve.gateway.app import main

if __name__ == "__main__":
    sys.exit(main())
