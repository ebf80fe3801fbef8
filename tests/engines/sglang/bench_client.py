"""``python -m sglang.bench_serving`` of an installed release, on a machine without a GPU.

The client is the release's own. The import of SGLang needs a name of torchvision's library there,
and the client imports Hugging Face's ``datasets`` for a data set that the tests do not use.
"""

import importlib.util
import runpy
import sys
import types

from kits.sglang_engine import prepare

prepare()
if importlib.util.find_spec("datasets") is None:
    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = None  # type: ignore[attr-defined]
    sys.modules["datasets"] = stand_in
runpy.run_module("sglang.bench_serving", run_name="__main__", alter_sys=True)
