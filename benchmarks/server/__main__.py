"""``python -m benchmarks.server``."""

import sys

from benchmarks.server.command import main

if __name__ == "__main__":
    sys.exit(main())
