"""``python -m benchmarks.engines.forward``."""

import sys

from benchmarks.engines.forward.command import main

sys.exit(main())
