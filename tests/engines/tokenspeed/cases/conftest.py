"""Runs inside a TokenSpeed release; ``tests/engines/tokenspeed/test_releases.py`` starts it.

The plugin is always loaded as TokenSpeed loads it: ``discover_plugins()`` and
``ensure_loaded()``, by the installed entry points.
"""

from __future__ import annotations

import logging
import os

import pytest
from kits.told import forget

MODES = (
    "dsa_decode_topk", "dsa_prefill_topk", "dsv41_index_topk", "dsv4_decode_topk",
    "dsv4_prefill_topk",
)  # fmt: skip


@pytest.fixture(scope="session")
def _engine():
    from kits.tokenspeed_engine import Engine
    from kits.tokenspeed_v41 import V41

    engine = Engine()
    engine.v41 = V41(engine)
    engine.without_plugin = {mode: engine.chosen(mode) for mode in MODES}
    runtime = engine.runtime()
    engine.readers = {n: f for n, f in vars(runtime).items() if n.startswith("read_deepseek_v4")}
    return engine


@pytest.fixture
def engine(_engine, monkeypatch, caplog):
    """The engine with nothing of the plugin registered."""
    from dsv4_plugin.engines.tokenspeed import unregister

    for name in [n for n in os.environ if n.startswith(("DSV4_", "TOKENSPEED_"))]:
        monkeypatch.delenv(name)

    def clean():
        unregister()
        vars(_engine.runtime()).update(_engine.readers)
        _engine.pose(9)
        _engine.install_deep_gemm()
        _engine.maths.fail_on_bf16 = False

    clean()
    _engine.plugins.reset_plugins()
    _engine.calls.clear()
    forget()
    # TokenSpeed's own loggers do not propagate; the plugin's logger must.
    caplog.set_level(logging.DEBUG, logger="dsv4_plugin")
    yield _engine
    clean()


@pytest.fixture
def load(engine, monkeypatch):
    """Load both kinds of plugins as a new process does, with these settings.

    Nothing is compiled here, so ``DSV4_BACKEND=torch`` stands for a machine with the kernels.
    """

    def load_plugins(**settings: str) -> list[str]:
        for name, value in {"DSV4_PLUGIN": "1", "DSV4_BACKEND": "torch", **settings}.items():
            monkeypatch.setenv(name, value)
        engine.plugins.reset_plugins()
        before = set(engine.registry._by_name)
        engine.load_runtime_plugins()
        return sorted(set(engine.registry._by_name) - before)

    return load_plugins


@pytest.fixture
def no_plugin_logits(monkeypatch) -> None:
    """Our logits kernels are not there, though the top-k is."""
    from kits.engine_parts import without_plugin_logits

    from dsv4_plugin.ops import dispatch as backends

    monkeypatch.setattr(backends, "unmet", without_plugin_logits(backends.unmet))


@pytest.fixture
def upstream(engine, monkeypatch):
    """Replace TokenSpeed's own kernels, which need a GPU; record the arguments of their calls.

    Only their bodies are replaced: registration, traits, features and selection are TokenSpeed's.
    """
    calls = []

    def stand_in(name):
        def kernel(**kwargs):
            calls.append((name, kwargs))
            return ("upstream", name)

        return kernel

    for name in engine.without_plugin.values():
        monkeypatch.setitem(engine.registry._impls, name, stand_in(name))
    engine.registry.clear_cache()
    yield calls
    engine.registry.clear_cache()
