"""``register()`` in every situation of an engine's process: it never raises.

The engine here is a package of a few lines that a test writes when it needs it. The folder ``vllm``
tests the adapter in real vLLM code. Each situation gets a process of its own, because the tests are
about imports.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from kits.fake_vllm import FAKE_VLLM, INDEXER
from kits.own_process import run_alone

ROOT = Path(__file__).resolve().parents[2]

PRELUDE = """
import logging, sys, os
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(levelname)s %(message)s")
from dsv4_plugin.engines.vllm import register, unregister
"""


def run(code: str, tmp_path: Path, engine: dict[str, str] | None = None, **env: str) -> str:
    return run_alone(PRELUDE + textwrap.dedent(code), tmp_path, engine, **env)


def test_without_the_engine(tmp_path):
    out = run("register(); register(); unregister(); print('fine')", tmp_path)
    assert out.strip() == "fine"


def test_it_imports_neither_torch_nor_the_engine(tmp_path):
    out = run(
        """
        register()
        print(sorted({n.partition('.')[0] for n in sys.modules} & {'torch', 'vllm', 'triton'}))
        """,
        tmp_path,
        FAKE_VLLM,
    )
    assert out.strip() == "[]"


def test_it_is_cheap(tmp_path):
    """Every `vllm` command pays for it: 20 ms would be too much."""
    out = run(
        """
        import time
        began = time.perf_counter()
        for _ in range(100): register()
        print((time.perf_counter() - began) / 100)
        """,
        tmp_path,
    )
    assert float(out) < 0.005


@pytest.mark.parametrize("first", ["register", "import"])
def test_before_and_after_the_import(tmp_path, first):
    """Both orders end in the same seams; twice is once."""
    order = (
        "register(); register(); import {m}" if first == "register" else "import {m}; register()"
    )
    out = run(
        order.format(m=INDEXER)
        + """
        register()
        import dsv4_plugin
        status = dsv4_plugin.status()
        print(status['engine'])
        print(sorted(n for n, s in status['seams'].items() if s['where']))
        import vllm._custom_ops as ops
        print(hasattr(ops.top_k_per_row_prefill.__wrapped__, '__wrapped__'))
        print([type(f).__name__ for f in sys.meta_path if 'dsv4' in type(f).__module__])
        """.replace("\n        ", "\n"),
        tmp_path,
        {**FAKE_VLLM},
    )
    assert "vLLM 9.9.9" in out
    assert "['gather', 'guard', 'logits', 'topk.decode', 'topk.prefill']" in out
    assert "False\n" in out
    # The finder stays only as long as something waits: here the command line's module.
    assert "['_Finder']" in out


def test_the_finder_leaves_when_nothing_waits(tmp_path):
    out = run(
        f"""
        register()
        import vllm.engine.arg_utils, {INDEXER}
        print([type(f).__name__ for f in sys.meta_path if 'dsv4' in type(f).__module__])
        """,
        tmp_path,
        FAKE_VLLM,
    )
    assert out.splitlines()[-1] == "[]"


def test_unregister_before_the_import(tmp_path):
    out = run(
        f"""
        register(); unregister()
        import {INDEXER}
        import dsv4_plugin
        print(dsv4_plugin.status(), [f for f in sys.meta_path if 'dsv4' in type(f).__module__])
        """,
        tmp_path,
        FAKE_VLLM,
    )
    assert out.splitlines()[-1] == "{'engine': None, 'seams': {}, 'counters': {}} []"


def test_the_kill_switch(tmp_path):
    out = run(
        f"""
        register()
        import {INDEXER}
        import dsv4_plugin
        print(dsv4_plugin.status()['seams'], 'dsv4_plugin.engines.vllm.install' in sys.modules)
        """,
        tmp_path,
        FAKE_VLLM,
        DSV4_PLUGIN="0",
    )
    assert out.splitlines()[-1] == "{} False"
    assert "DSV4_PLUGIN=0" in out


@pytest.mark.parametrize(
    "variables", [{"DSV4_PLUGIN": "yes"}, {"DSV4_TOPK": "half"}, {"DSV4_LOG": "loud"}]
)
def test_a_wrong_setting_does_not_raise_here(tmp_path, variables):
    out = run("register(); print('alive')", tmp_path, FAKE_VLLM, **variables)
    (name, value) = next(iter(variables.items()))
    assert f"{name} is {value!r}" in out
    assert out.splitlines()[-1] == "alive"


@pytest.mark.parametrize("name", ["PLUGIN", "TOPK", "LOG", "STATUS_DIR"])
@pytest.mark.parametrize("value", ["", "yes"])
def test_not_asked_a_layer_is_built_whatever_the_environment_holds(tmp_path, name, value):
    """A server in which the plugin is only installed logs at most one WARNING."""
    out = run(
        f"""
        register(); register()
        import {INDEXER} as module
        module.SparseAttnIndexer(None); module.SparseAttnIndexer(None)
        print('alive')
        """,
        tmp_path,
        FAKE_VLLM,
        **{f"DSV4_{name}": value},
    )
    assert out.splitlines()[-1] == "alive"
    assert out.count("WARNING") == out.count(f"DSV4_{name} is 'yes'") == bool(value)
    assert "ERROR" not in out


BROKEN_ENGINES = {
    "the indexer is gone": {INDEXER.replace(".", "/") + ".py": ""},
    "the indexer does not import": {
        INDEXER.replace(".", "/") + ".py": "raise ImportError('no CUDA here')"
    },
    "another form of everything": {
        INDEXER.replace(".", "/") + ".py": """
            fp8_fp4_paged_mqa_logits = 3
            sparse_attn_indexer = None
            class SparseAttnIndexer: pass
            """,
        "vllm/_custom_ops.py": "",
        "vllm/model_executor/layers/indexer_topk.py": "SparseIndexerTopk = None",
    },
    "a class that refuses attributes": {
        INDEXER.replace(".", "/") + ".py": """
            class Meta(type):
                def __setattr__(cls, name, value): raise AttributeError("sealed")
            class SparseAttnIndexer(metaclass=Meta):
                def __init__(self, k_cache): pass
            """,
    },
}


@pytest.mark.parametrize("broken", BROKEN_ENGINES.values(), ids=BROKEN_ENGINES)
def test_an_engine_of_another_shape(tmp_path, broken):
    """Whatever the module looks like: importing it ends as it does without the plugin."""
    imports = "no CUDA" not in str(broken)
    topks = ("topk.decode", "topk.prefill", "topk.slots", "topk.fill")
    names = ("guard", *topks, "logits", "candidates", "gather", "budget", "shard")
    expected = str(set(names)) if imports else "()"
    code = f"""
        register()
        try:
            import {INDEXER}
        except ImportError as error:
            print('as without the plugin:', error)
        register()
        import dsv4_plugin
        seams = dsv4_plugin.status()['seams']
        assert set(seams) == set({expected}), seams
        for name, seam in seams.items():
            assert seam['why'] and not seam['engaged'], (name, seam)
        print('alive')
        """
    out = run(code, tmp_path, {**FAKE_VLLM, **broken})
    assert out.splitlines()[-1] == "alive"
    if not imports:
        assert "as without the plugin: no CUDA here" in out


def test_a_command_line_of_another_shape(tmp_path):
    out = run(
        "register(); import vllm.engine.arg_utils; print('alive')",
        tmp_path,
        {**FAKE_VLLM, "vllm/engine/arg_utils.py": "class EngineArgs: pass"},
    )
    assert out.splitlines()[-1] == "alive"
    assert "vllm.engine.arg_utils could not be patched" in out


def test_the_plugin_itself_is_broken(tmp_path):
    """An adapter module that cannot be imported does not change the engine; one log line."""
    out = run(
        f"""
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == 'dsv4_plugin.engines.vllm.install':
                    raise ImportError('half an installation')
        sys.meta_path.insert(0, Finder())
        register()
        import {INDEXER} as module
        import vllm._custom_ops as ops
        print(ops.top_k_per_row_prefill(*range(8)))
        """,
        tmp_path,
        FAKE_VLLM,
    )
    assert out.splitlines()[-1] == "upstream"
    assert "half an installation" in out
    assert f"{INDEXER} could not be patched" in out


def test_a_broken_library_is_a_reason_and_no_crash(tmp_path):
    """A .so that cannot be loaded: the layer is built, upstream serves it."""
    out = run(
        f"""
        import torch
        from pathlib import Path
        from dsv4_plugin.kernels import cuda
        cuda.LIBRARY = Path(os.environ['BROKEN'])
        register()
        import {INDEXER} as module
        module.SparseAttnIndexer(None)
        import dsv4_plugin
        print(dsv4_plugin.status()['seams']['topk.decode']['why'])
        print(cuda.missing())
        """,
        tmp_path,
        {**FAKE_VLLM, "broken.so": "this is no ELF file"},
        DSV4_PLUGIN="1",
        BROKEN=str(tmp_path / "broken.so"),
    )
    assert "its indexer takes another way there" in out
    assert "broken.so cannot be loaded" in out


def test_the_entry_point_names_register():
    """What vLLM finds by its group is this very function."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split('[project.entry-points."vllm.general_plugins"]')[1].splitlines()[1]
    assert section == 'dsv4 = "dsv4_plugin.engines.vllm:register"'
