"""Runs inside a vLLM release; ``tests/engines/vllm/test_releases.py`` starts these cases.

Each release has one process, because the import of vLLM's indexer takes some ten seconds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys

import pytest
import torch
from kits.told import forget

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"  # vLLM's own choice for DeepSeek-V4 and V4.1

INDEXER = "vllm.model_executor.layers.sparse_attn_indexer"


def pytest_collection_modifyitems(config, items):
    """Leave out what a release lacks: DeepSeek-V4.1 (0.30), rows that ranks share (0.32).

    Where vLLM shares them the plugin does not.
    """
    if importlib.util.find_spec("vllm") is not None:
        import vllm

        version = tuple(map(int, vllm.__version__.split(".")[:2]))
        here = {
            "case_candidates": version >= (0, 30),
            "case_ranks": version >= (0, 32),
            "case_shard": version < (0, 32),
        }
        gone = [
            item
            for item in items
            for start, there in here.items()
            if item.path.name.startswith(start) and not there
        ]
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]


class Start:
    """The facts right after vLLM has loaded its plugins, before any other step."""

    def __init__(self) -> None:
        import vllm  # noqa: F401
        from vllm.plugins import load_general_plugins

        os.environ["VLLM_PLUGINS"] = "dsv4"  # vLLM brings some of its own, which import it
        before = set(sys.modules)
        load_general_plugins()
        del os.environ["VLLM_PLUGINS"]
        self.imported = set(sys.modules) - before
        self.indexer_loaded = INDEXER in sys.modules


@pytest.fixture(scope="session")
def start() -> Start:
    return Start()


@pytest.fixture(scope="session")
def _engine(start):
    from kits.vllm_engine import Engine

    from dsv4_plugin.state import status

    engine = Engine()
    engine.after_import = status()
    return engine


@pytest.fixture
def engine(_engine, monkeypatch, caplog):
    """The engine with the plugin just registered and not switched on."""
    from dsv4_plugin.engines.vllm import register, unregister

    for name in [n for n in os.environ if n.startswith("DSV4_")]:
        monkeypatch.delenv(name)
    unregister()
    _engine.install_deep_gemm()
    _engine.deep_gemm.native = None
    _engine.deep_gemm.fail_on_bf16 = False
    _engine.calls.clear()
    forget()
    caplog.set_level(logging.DEBUG, logger="dsv4_plugin")
    register()
    yield _engine
    unregister()


@contextlib.contextmanager
def another_reader():
    """Within it other code's prefill top-k, which reads float32, replaces the plugin's."""
    ops = sys.modules["vllm._custom_ops"]
    patched = ops.top_k_per_row_prefill
    plain = patched.__wrapped__
    ops.top_k_per_row_prefill = lambda *args: plain(*args)
    try:
        yield
    finally:
        ops.top_k_per_row_prefill = patched


def canonical(indices: torch.Tensor) -> torch.Tensor:
    """Sort every row's columns, with -1 last: the order is unspecified."""
    last = torch.iinfo(torch.int32).max
    ordered = indices.masked_fill(indices < 0, last).sort(dim=1).values
    return ordered.masked_fill(ordered == last, -1)


class Run:
    """Build a layer and run one step of it."""

    def __init__(self, engine):
        self.engine = engine

    def __call__(
        self, problem, *, gpu=90, model="deepseek_v4", config=None, direct=False, layer=None,
        **parallel,
    ):  # fmt: skip
        with self.engine.gpu(gpu), self.engine.config(model, config, **parallel):
            built = self.engine.layer(problem, **(layer or {}))
            self.engine.calls.clear()
            step = self.engine.step_direct if direct else self.engine.step
            return canonical(step(built, problem))

    def build(self, problem, *, gpu=90, model="deepseek_v4", config=None, layer=None, **parallel):
        with self.engine.gpu(gpu), self.engine.config(model, config, **parallel):
            return self.engine.layer(problem, **(layer or {}))


@pytest.fixture
def run(engine):
    return Run(engine)


@pytest.fixture
def no_plugin_logits(monkeypatch) -> None:
    """Our logits kernels are not there, though the top-k is."""
    from kits.engine_parts import without_plugin_logits

    from dsv4_plugin.ops import dispatch as backends

    monkeypatch.setattr(backends, "unmet", without_plugin_logits(backends.unmet))


@pytest.fixture
def can_bf16(engine) -> bool:
    """Whether this release's DeepGEMM can write bfloat16 on request."""
    import inspect

    return "logits_dtype" in inspect.signature(engine.deep_gemm.paged).parameters
