"""``python -m dlion``."""

import sys

from dlion.cli import main

if __name__ == "__main__":
    sys.exit(main())
