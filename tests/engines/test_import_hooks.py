"""The import hook beside other finders and loaders, and with a module that is partly imported."""

from __future__ import annotations

import textwrap
import zipfile
from pathlib import Path

import pytest
from kits.fake_vllm import FAKE_VLLM, INDEXER
from kits.own_process import run_alone

PRELUDE = """
import importlib, importlib.machinery, importlib.util, inspect, os, sys, threading
from importlib.machinery import PathFinder
from dsv4_plugin.engines.shared import import_hooks
seen = []
def look(module): seen.append((module.__name__, module.X))
def wait(name="engine"): import_hooks.after_import(name, look)
def fine(name="engine"):
    module = sys.modules[name]
    loader = type(module.__loader__).__module__ + type(module.__spec__.loader).__module__
    assert "dsv4" not in loader and module.__loader__ is module.__spec__.loader
    assert type(module.__spec__) is importlib.machinery.ModuleSpec
    assert seen == [(name, 1)], seen
    assert not any("dsv4" in type(f).__module__ for f in sys.meta_path)
    print("fine")
"""
ENGINE = {"engine.py": "X = 1\n"}
KEEPS = """
class Keeps:
    kept = {}
    def find_spec(self, name, path=None, target=None):
        if name not in self.kept: self.kept[name] = PathFinder.find_spec(name, path)
        return self.kept[name]
"""
CASES = {
    "nothing special": "wait(); import engine; fine()",
    "twice": "wait(); wait(); import engine; fine()",
    "there already": "import engine; wait(); fine()",
    "asked for first": "wait(); [importlib.util.find_spec('engine') for _ in range(3)]\n"
    "import engine; fine()",
    "one spec for all": KEEPS + "sys.meta_path.insert(0, Keeps()); wait()\n"
    "[importlib.util.find_spec('engine') for _ in range(3)]\n"
    "import engine; fine()\n"
    "assert engine.__spec__ == Keeps.kept['engine']\n"
    "assert 'exec_module' not in vars(Keeps.kept['engine'].loader)",
    "one spec for all, in front": KEEPS + "wait(); sys.meta_path.insert(0, Keeps())\n"
    "Keeps.kept['engine'] = sys.meta_path[1].find_spec('engine', None)\n"
    "import engine; fine()",
    "a finder that asks all others": """
class Asks:
    def find_spec(self, name, path=None, target=None):
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None: return spec
sys.meta_path.insert(0, Asks()); wait()
import engine; fine()
""",
    "a loader in C": "sys.path.insert(0, 'engine.zip'); wait()\n"
    "importlib.util.find_spec('engine'); import zipped; import engine; fine()\n"
    "assert inspect.getsource(engine) == 'X = 1\\n'",
    "a loader that takes no attributes": """
class Sealed:
    __slots__ = ()
    def create_module(self, spec): return None
    def exec_module(self, module): module.X = 1
class Finds:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, Sealed()) if name == 'engine' else None
sys.meta_path.insert(0, Finds()); wait(); import engine; fine()
""",
    "a loader that is a class": """
class Loads:
    @staticmethod
    def create_module(spec): return None
    @staticmethod
    def exec_module(module): module.X = 1
class Finds:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, Loads) if name in ('engine', 'b') else None
sys.meta_path.insert(0, Finds()); wait(); importlib.util.find_spec('engine')
import b, engine; fine()
""",
    "an import that fails at first": "os.environ['FAIL'] = '1'; wait('fails')\n"
    "try: import fails\n"
    "except ZeroDivisionError: del os.environ['FAIL']\n"
    "import fails; fine('fails')",
    "lazily": "wait(); spec = importlib.util.find_spec('engine')\n"
    "spec.loader = importlib.util.LazyLoader(spec.loader)\n"
    "module = importlib.util.module_from_spec(spec); sys.modules['engine'] = module\n"
    "spec.loader.exec_module(module); assert not seen\n"
    "assert module.X == 1; fine()",
    "by hand": "wait(); spec = importlib.util.find_spec('engine')\n"
    "module = importlib.util.module_from_spec(spec); sys.modules['engine'] = module\n"
    "spec.loader.exec_module(module); fine()",
    "reloaded": "wait(); import engine; importlib.reload(engine); fine()",
    "forgotten": "wait(); importlib.util.find_spec('engine'); import_hooks.forget('engine')\n"
    "import engine; seen.append(('engine', 1)); fine()",
    "in part, by itself": "sys.modules['main'] = sys.modules['__main__']\n"
    "import part; fine('part')",
    "in part, and fails": "sys.modules['main'] = sys.modules['__main__']\n"
    "os.environ['FAIL'] = '1'\n"
    "try: import part\n"
    "except ZeroDivisionError: del os.environ['FAIL']\n"
    "assert not seen; import part; fine('part')",
    "in part, by another thread": """
sys.modules['main'] = sys.modules['__main__']
begun, go = threading.Event(), threading.Event()
def importing():
    import slow
thread = threading.Thread(target=importing); thread.start()
begun.wait(); wait('slow'); wait('slow'); assert not seen
go.set(); thread.join(); fine('slow')
""",
    "in part, forgotten and waited for again": """
sys.modules['main'] = sys.modules['__main__']
begun, go = threading.Event(), threading.Event()
def importing():
    import slow
thread = threading.Thread(target=importing); thread.start()
begun.wait(); wait('slow'); import_hooks.forget('slow'); wait('slow')
go.set(); thread.join(); fine('slow')
""",
}
FILES = {
    **ENGINE,
    "fails.py": "import os\nX = 1 / ('FAIL' not in os.environ)\n",
    "part.py": "import main, os\nmain.wait('part')\nassert not main.seen\n"
    "X = 1 / ('FAIL' not in os.environ)\n",
    "slow.py": "import main\nmain.begun.set()\nmain.go.wait(60)\nX = 1\n",
}


@pytest.mark.parametrize("code", CASES.values(), ids=CASES)
def test_called_once_with_the_whole_module(tmp_path: Path, code: str) -> None:
    if "zip" in code:
        with zipfile.ZipFile(tmp_path / "engine.zip", "w") as file:
            file.writestr("engine.py", "X = 1\n")
            file.writestr("zipped.py", "X = 2\n")
    files = {} if "zip" in code else FILES
    out = run_alone(PRELUDE + textwrap.dedent(code), tmp_path, files)
    assert out.splitlines()[-1] == "fine"


def test_a_loader_of_old_is_one_warning(tmp_path: Path) -> None:
    """Without ``exec_module`` the hook cannot follow; the import is unchanged."""
    code = """
class Finds:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, object()) if name == 'engine' else None
wait(); sys.meta_path.insert(0, Finds())
for _ in range(2):
    try: import engine
    except (ImportError, AttributeError): print('as without the plugin')
import_hooks._finder.find_spec('engine', None); import_hooks._finder.find_spec('engine', None)
"""
    out = run_alone(PRELUDE + code, tmp_path)
    assert out.count("as without the plugin") == 2
    assert out.count("engine is imported in a way that cannot be followed") == 1


def test_a_spec_of_another_kind_is_one_warning(tmp_path: Path) -> None:
    code = """
class Spec(importlib.machinery.ModuleSpec):
    def __copy__(self): raise TypeError('not to be copied')
class Finds:
    def find_spec(self, name, path=None, target=None):
        found = PathFinder.find_spec(name, path)
        return found and Spec(name, found.loader, origin=found.origin)
wait(); sys.meta_path.insert(0, Finds())
sys.meta_path.insert(0, sys.meta_path.pop(1))
import engine
print(engine.X, seen)
"""
    out = run_alone(PRELUDE + code, tmp_path, FILES)
    assert out.splitlines()[-1] == "1 []"
    assert out.count("engine is imported in a way that cannot be followed") == 1


def test_a_neighbour_of_vllms_indexer_that_is_imported_in_part(tmp_path: Path) -> None:
    """The indexer is imported by a module that is patched with it: first that is let through."""
    text = textwrap.dedent(FAKE_VLLM["vllm/_custom_ops.py"])
    files = {**FAKE_VLLM, "vllm/_custom_ops.py": f"import {INDEXER}\n" + text}
    indexer = files[INDEXER.replace(".", "/") + ".py"]
    files[INDEXER.replace(".", "/") + ".py"] = indexer.replace(
        "from vllm import _custom_ops as ops", "import vllm._custom_ops as ops"
    )
    code = (
        "from dsv4_plugin.engines.vllm import register, unregister\n"
        "register()\nimport vllm._custom_ops as ops, dsv4_plugin\n"
        "seams = dsv4_plugin.status()['seams']\n"
        "print(sorted(n for n in ('guard', 'gather', 'topk.prefill') if seams[n]['where']))\n"
        "assert hasattr(ops.top_k_per_row_prefill, '__wrapped__')\n"
    )
    assert (
        run_alone(code, tmp_path, files).splitlines()[-1] == "['gather', 'guard', 'topk.prefill']"
    )
