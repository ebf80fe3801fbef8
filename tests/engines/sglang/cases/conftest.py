"""Runs inside an SGLang release; ``tests/engines/sglang/test_releases.py`` starts these cases.

Each release has one process, because the import of SGLang's indexer takes some seconds. The plugin
is always loaded as SGLang loads it: ``load_plugins()``, by the installed entry point.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module

import pytest
import torch
from kits.told import forget

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

INDEXER = "sglang.srt.layers.attention.dsv4.indexer"
V41 = "sglang.srt.layers.attention.dsv4.v41_indexer"
FACTORIES = ("make_candidate_indexer", "make_full_topk_indexer")
METADATA = "sglang.srt.layers.attention.dsv4.metadata"
BUDGET = ("plan_indexer_row_chunks", "_get_nonpaged_indexer_plan")
SINCE = "0.5.22"  # the seams of V4.1 and of the budget are there from then on
BACKEND = "sglang.srt.layers.attention.deepseek_v4_backend"


class Start:
    """What was true right after ``register()`` had been called, before SGLang applied anything."""

    def __init__(self) -> None:
        from kits.sglang_engine import prepare

        prepare()
        import sglang.srt.plugins  # noqa: F401

        from dsv4_plugin.engines.sglang import register, unregister

        os.environ["DSV4_PLUGIN"] = "1"
        before = set(sys.modules)
        register()
        self.imported = set(sys.modules) - before
        self.indexer_loaded = INDEXER in sys.modules
        unregister()
        del os.environ["DSV4_PLUGIN"]


@pytest.fixture(scope="session")
def start() -> Start:
    return Start()


@pytest.fixture(scope="session")
def _engine(start):
    from kits.sglang_engine import Engine

    engine = Engine()
    engine.pristine = places(engine)
    return engine


def places(engine):
    """Every attribute that the plugin may replace, by owner and name, as it is now."""
    from sglang.srt.server_args import ServerArgs

    names = engine.topk_names()
    owners = [(engine.indexer, name) for name in names]
    owners += [(engine.topk_module(), name) for name in names]
    owners += [(engine.indexer.C4IndexerBackendMixin, "forward_c4_indexer")]
    owners += [(engine.dsa.DSATopKBackend, "topk_transform")]
    owners += [(engine.deep_gemm, n) for n in ("fp8_paged_mqa_logits", "fp8_mqa_logits")]
    owners += [(ServerArgs, "add_cli_args")]
    if engine.version >= SINCE:
        owners += [(module, name) for module in (V41, BACKEND) for name in FACTORIES]
        owners += [(METADATA, BUDGET[0]), (engine.indexer.C4IndexerBackendMixin, BUDGET[1])]
    owners = [(import_module(o) if isinstance(o, str) else o, name) for o, name in owners]
    return {(owner, name): _plain(vars(owner)[name]) for owner, name in owners}


def _plain(value):
    return value.__func__ if isinstance(value, staticmethod) else value


@pytest.fixture
def engine(_engine, monkeypatch, caplog):
    """The engine with nothing registered, and every attribute as SGLang has set it."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from dsv4_plugin.engines.sglang import registry, unregister

    def clean():
        unregister()
        registry._hooks.clear()
        HookRegistry.reset()
        for (owner, name), value in _engine.pristine.items():
            setattr(owner, name, staticmethod(value) if name == "add_cli_args" else value)

    for name in [n for n in os.environ if n.startswith(("DSV4_", "SGLANG_PLUGINS"))]:
        monkeypatch.delenv(name)
    clean()
    _engine.deep_gemm = next(o for o, n in _engine.pristine if n == "fp8_mqa_logits")
    sys.modules["deep_gemm"] = _engine.deep_gemm
    _engine.maths.fail_on_bf16 = False
    _engine.calls.clear()
    forget()
    caplog.set_level(logging.DEBUG, logger="dsv4_plugin")
    yield _engine
    clean()
    sys.modules["deep_gemm"] = _engine.deep_gemm


@pytest.fixture
def load(engine, monkeypatch):
    """Load the plugins as a new scheduler process does, with these settings."""

    def load_plugins(**settings: str) -> None:
        import sglang.srt.plugins as plugins

        for name, value in {"DSV4_PLUGIN": "1", **settings}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(plugins, "_plugins_loaded", False)
        plugins.load_plugins()

    return load_plugins


@pytest.fixture
def no_plugin_logits(monkeypatch) -> None:
    """Our logits kernels are not there, though the top-k is."""
    from kits.engine_parts import without_plugin_logits

    from dsv4_plugin.ops import dispatch as backends

    monkeypatch.setattr(backends, "unmet", without_plugin_logits(backends.unmet))


def expected(engine, problem):
    """The exact answer, from the logits that were written in this step."""
    from kits.engine_parts import oracle

    logits = engine.logits_of().logits
    rows = zip(logits, problem.lengths.tolist(), strict=True)
    return torch.stack([oracle(row[:n].float(), problem.k) for row, n in rows])


def names(engine):
    return {call.name for call in engine.calls}


# --- DeepSeek-V4.1 (case_v41_*.py, from 0.5.22 on) ------------------------------------------------


class Used:
    """What one test has called: the plugin's ops, and SGLang's kernels.

    ``shapes`` are those of the queries of the ops that score, ``widths`` those of whole rows.
    """

    def __init__(self, engine):
        self._engine = engine
        self.ops, self.shapes, self.widths = [], [], []

    @property
    def engine(self):
        return names(self._engine) & {"scan", "masked scan", "amax8", "deep_select", "topk_v2"}


CANDIDATE_OPS = (
    "block_maxima", "select_blocks", "candidate_logits", "select_candidates", "candidate_select",
)  # fmt: skip


@pytest.fixture
def used(engine, monkeypatch):
    from dsv4_plugin.engines.sglang import v41_calls

    found = Used(engine)

    def noting(name, op):
        def noted(*args, **kwargs):
            found.ops.append(name)
            if name not in ("topk", "select_blocks", "select_candidates"):
                found.shapes.append(tuple(args[0].shape))
            if name in ("paged_logits", "block_maxima"):
                out = kwargs["out"] if name == "paged_logits" else kwargs["logits"]
                found.widths += [] if out is None else [tuple(out.shape)]
            return op(*args, **kwargs)

        return noted

    for name in ("paged_logits", "topk"):
        monkeypatch.setattr(v41_calls, name, noting(name, getattr(v41_calls, name)))
    for name in CANDIDATE_OPS:
        monkeypatch.setattr(v41_calls.ops, name, noting(name, getattr(v41_calls.ops, name)))
    return found


@pytest.fixture(scope="session")
def _v41(_engine):
    from kits.sglang_v41 import V41

    return V41(_engine)


@pytest.fixture
def make_model(engine, _v41):
    from kits.sglang_v41 import Model

    def make(*, held, context=1024, requests=6, **more):
        return Model(_v41, context, requests, held=held, **more)

    return make
