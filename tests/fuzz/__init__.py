"""``python -m tests.fuzz``: random calls of the ops, each checked without a reference and with one.

:mod:`.case` defines what a case is and how it is written. :mod:`.topk`, :mod:`.cache`,
:mod:`.logits` (with :mod:`.logits_run`), :mod:`.candidates` and :mod:`.candidate_selections` draw,
run, check and simplify the cases of their ops. They share :mod:`.tensors`. :mod:`.engine` has the
loop and the shrinking, :mod:`.command` the command line. A new op needs a module with a
:class:`.case.Case`, an entry in ``engine.RUNS`` and its name in ``command.FUZZED``.
"""

import sys
from pathlib import Path

# Run as a command, it has the checkout on its path: ``kits`` is beside it.
sys.path.append(str(Path(__file__).resolve().parents[1]))
