"""``python -m dsv4_plugin.testing.hosts_gpu``."""

import sys

from dsv4_plugin.testing.hosts_gpu.command import main

sys.exit(main())
