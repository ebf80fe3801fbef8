"""``python -m dsv4_plugin.testing.e2e``."""

import sys

from dsv4_plugin.testing.e2e.command import main

if __name__ == "__main__":
    sys.exit(main())
