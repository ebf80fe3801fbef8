"""``python -m dsv4_plugin.cli`` is ``python -m dsv4_plugin``."""

import sys

from dsv4_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
