"""The engines' own code on a GPU, with the plugin and without it."""

import sys
from pathlib import Path

# The simulators of the engines (``kits``) belong to the tests.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
