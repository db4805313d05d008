"""`python -m tempact COMMAND ...` is `tempact COMMAND ...`."""

import sys

from tempact.cli import main

if __name__ == "__main__":
    sys.exit(main())
