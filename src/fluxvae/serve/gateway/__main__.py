"""``python -m fluxvae.serve.gateway``: see `command`."""

import sys

from fluxvae.errors import MissingExtraError, status_of
from fluxvae.extras import needs

if __name__ == "__main__":
    try:
        with needs("serve", "the gateway"):
            from fluxvae.serve.gateway.command import main
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        sys.exit(status_of(error).exit_code)
    sys.exit(main())
