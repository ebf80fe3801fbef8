"""The entry points for SGLang and TokenSpeed if the engine is absent, broken or of another form.

None of them may raise: an error there is at best a traceback in every process of the engine. The
folders of the engines test the adapters inside the engines.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from kits.own_process import run_alone

from dsv4_plugin.engines.shared import source
from dsv4_plugin.engines.shared.seam import Place

ROOT = Path(__file__).resolve().parents[2]
CALLS = {
    "sglang": "from dsv4_plugin.engines.sglang import register, unregister\n",
    "tokenspeed": "from dsv4_plugin.engines.tokenspeed import register, unregister\n",
    "tokenspeed kernels": "from dsv4_plugin.engines.tokenspeed import unregister\n"
    "from dsv4_plugin.engines.tokenspeed import register_kernels as register\n",
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
ODD_SGLANG = {
    "no files": {"sglang/__init__.py": ""},
    "no syntax": {"sglang/__init__.py": "", "sglang/srt/server_args.py": "class ("},
    "a registry of another shape": {
        "sglang/__init__.py": "",
        "sglang/srt/__init__.py": "",
        "sglang/srt/plugins/__init__.py": "",
        "sglang/srt/plugins/hook_registry.py": "class HookRegistry: pass\n",
        "sglang/srt/server_args.py": "class ServerArgs:\n    def add_cli_args(parser): pass\n",
    },
    "a registry that raises": {
        "sglang/__init__.py": "",
        "sglang/srt/__init__.py": "",
        "sglang/srt/plugins/__init__.py": "",
        "sglang/srt/plugins/hook_registry.py": "1 / 0\n",
        "sglang/srt/server_args.py": "class ServerArgs:\n    def add_cli_args(parser): pass\n",
    },
    "a package that cannot be imported": {"sglang/__init__.py": "raise OSError('no driver')"},
}
ODD_TOKENSPEED = {
    "no files": {"tokenspeed/__init__.py": "", "tokenspeed_kernel/__init__.py": ""},
    "a registry that raises": {
        "tokenspeed_kernel/__init__.py": "",
        "tokenspeed_kernel/platform.py": "1 / 0",
        "tokenspeed_kernel/registry.py": "def register_kernel(): pass\n"
        "class KernelRegistry: pass\nclass Priority: pass\n",
        "tokenspeed_kernel/ops/attention/dsa/__init__.py": "def dsa_decode_topk(q, weights, "
        "seq_lens, block_table): pass\n",
    },
}


PRELUDE = "import logging, sys\nlogging.basicConfig(level=logging.DEBUG, stream=sys.stdout)\n"


def run(code: str, tmp_path: Path, files: dict[str, str] | None = None, **env: str) -> str:
    return run_alone(PRELUDE + textwrap.dedent(code), tmp_path, files, **env)


AGAIN = "register(); register(); unregister(); register(); unregister(); print('alive')"


@calls
@pytest.mark.parametrize(
    "variables",
    [{}, {"DSV4_PLUGIN": "1"}, {"DSV4_PLUGIN": "0"}, {"DSV4_PLUGIN": "1", "DSV4_TOPK": "bf61"},
     {"DSV4_PLUGIN": "1", "DSV4_TOPK": "bf16", "DSV4_STRICT": "1"}],
    ids=lambda v: " ".join(f"{a}={b}" for a, b in v.items()) or "nothing set",
)  # fmt: skip
def test_without_the_engine(tmp_path, call, variables):
    out = run(call + AGAIN, tmp_path, **variables)
    assert out.splitlines()[-1] == "alive"
    assert "Traceback" not in out


@calls
def test_nobody_asked_nothing_is_imported(tmp_path, call):
    out = run(
        call + "register()\nheavy = {'torch', 'triton', 'sglang', 'tokenspeed_kernel'}\n"
        "print(sorted(heavy & set(sys.modules)))",
        tmp_path,
    )
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize("files", ODD_SGLANG.values(), ids=ODD_SGLANG)
@pytest.mark.parametrize("plugin", ["", "1"], ids=["not asked", "asked"])
def test_an_sglang_of_another_shape(tmp_path, files, plugin):
    out = run(CALLS["sglang"] + AGAIN, tmp_path, files, DSV4_PLUGIN=plugin)
    assert out.splitlines()[-1] == "alive"


@pytest.mark.parametrize("files", ODD_TOKENSPEED.values(), ids=ODD_TOKENSPEED)
def test_a_tokenspeed_of_another_shape(tmp_path, files):
    code = CALLS["tokenspeed"] + AGAIN + "\n" + CALLS["tokenspeed kernels"] + AGAIN
    out = run(code, tmp_path, files, DSV4_PLUGIN="1")
    assert out.splitlines()[-1] == "alive"


@calls
def test_half_an_installation(tmp_path, call):
    """A module of the plugin that cannot be imported is a log line."""
    block = (
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.endswith(('.probe', '.registration', '.readers', '.install')):\n"
        "            raise ImportError('half an installation')\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    out = run(block + call + "register(); print('alive')", tmp_path, DSV4_PLUGIN="1")
    assert out.splitlines()[-1] == "alive"
    assert "half an installation" in out


# --- looking into source without importing ---------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "an_engine" / "sub").mkdir(parents=True)
    (tmp_path / "an_engine" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "an_engine" / "sub" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "an_engine"


def test_source_is_read_and_not_imported(package):
    (package / "sub" / "ops.py").write_text(
        textwrap.dedent(
            """
            from somewhere import topk as renamed, other
            try:
                import fast
            except ImportError:
                fast = None
            if fast:
                def select(a, /, b, *, c): pass
            class Layer:
                def forward(self, x): return x.topk()
            """
        )
    )
    module = source.find("an_engine.sub.ops")
    assert all(module.binds(n) for n in ("renamed", "other", "fast", "select", "Layer"))
    assert not module.binds("topk")
    assert module.text_of("Layer.forward").strip() == "def forward(self, x): return x.topk()"
    assert "class Layer" in module.text_of("")
    assert module.parameters("select") == ("a", "b", "c")
    Place("an_engine.sub.ops", "Layer.forward", ("self",)).in_source()
    Place("an_engine.sub.ops", "Layer.forward", ("x",), skip=1, exactly=True).in_source()
    for wrong in (
        Place("an_engine.sub.ops", "Layer.forward", ("self", "y")),
        Place("an_engine.sub.ops", "Layer.forward", ("self",), exactly=True),
        Place("an_engine.sub.ops", "Layer.forward", has=("y",)),
        Place("an_engine.sub.ops", "Layer.forward", used=("an_engine.sub.ops", "", "x.sort(")),
        Place("an_engine.sub.ops", "topk"),
    ):
        with pytest.raises(source.Missing, match=r"Layer.forward|topk|x.sort"):
            wrong.in_source()
    with pytest.raises(source.Missing, match="Layer.backward is gone"):
        module.parameters("Layer.backward")
    assert "an_engine" not in sys.modules


@pytest.mark.parametrize(
    "name, why",
    [("no_such_engine.ops", "not installed"), ("an_engine.sub.nothing", "is gone")],
)
def test_what_is_missing_says_so(package, name, why):
    with pytest.raises(source.Missing, match=why):
        source.find(name)


def test_a_file_that_cannot_be_parsed_is_missing(package):
    (package / "broken.py").write_text("def (")
    with pytest.raises(source.Missing, match="cannot be read"):
        source.find("an_engine.broken")


# --- the examples ----------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["serve_sglang.sh", "serve_tokenspeed.sh"])
def test_the_serve_examples_run_as_far_as_the_engine(tmp_path, script):
    """Under ``bash -n``, and executed with replacements of the two commands that they start."""
    path = ROOT / "examples" / script
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    engine = script.removeprefix("serve_").removesuffix(".sh")
    for command in (engine, "dsv4-plugin"):
        stub = tmp_path / command
        stub.write_text('#!/bin/sh\necho "$(basename $0)" "$@" "PLUGIN=$DSV4_PLUGIN"\n')
        stub.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DSV4_")}
    done = subprocess.run(
        ["bash", path, "--more", "options"],
        env={**clean, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": "a model", "TP": "8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    doctor, serve = done.stdout.splitlines()
    assert doctor.startswith("dsv4-plugin doctor")
    assert serve.startswith(f"{engine} serve") and "a model" in serve and " 8 " in serve
    assert "--more options" in serve
    if engine == "sglang":
        assert "--dsv4-topk auto" in serve
    else:
        assert "PLUGIN=1" in serve


def test_the_adapters_read_no_environment() -> None:
    """``envs.py`` is the one place that reads ``DSV4_*``."""
    for path in (ROOT / "dsv4_plugin" / "engines").rglob("*.py"):
        if path.parent.name == "vllm":  # its flag sets a variable of Ray's
            continue
        names = {
            n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)
        }
        assert not names & {"environ", "getenv"}, path
