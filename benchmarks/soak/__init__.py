"""``python -m benchmarks.soak``: :mod:`.command` has the options, :mod:`.load` the load."""

import sys
from pathlib import Path

# ``kits.replay``, which replays a call, is a module of the tests.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
