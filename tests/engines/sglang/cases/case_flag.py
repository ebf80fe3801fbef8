"""``--dsv4-topk`` in SGLang's own parser, and how its value reaches other processes."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import SINCE

from dsv4_plugin import settings

ROOT = Path(__file__).resolve().parents[4]


def merged(parser, arguments):
    try:
        from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger
    except ImportError:  # 0.5.16
        from sglang.srt.server_args_config_parser import ConfigArgumentMerger
    return ConfigArgumentMerger(parser).merge_config_with_args(list(arguments))


@pytest.fixture
def parse(engine, load):
    """Parse a command line as ``sglang serve`` does, after the plugins were loaded."""

    def run(*arguments: str, **environ: str) -> argparse.Namespace:
        from sglang.srt.server_args import ServerArgs

        load(**{"DSV4_PLUGIN": "", **environ})
        parser = argparse.ArgumentParser()
        ServerArgs.add_cli_args(parser)
        if "--config" in arguments:
            arguments = merged(parser, arguments)
        return parser.parse_args(["--model-path", "nowhere", *arguments])

    return run


@pytest.mark.parametrize("value", ["auto", "bf16", "fp32"])
def test_a_dtype_switches_the_plugin_on(parse, value):
    namespace = parse("--dsv4-topk", value)
    assert os.environ["DSV4_TOPK"] == value
    assert os.environ["DSV4_PLUGIN"] == "1"
    assert settings().enabled and settings().topk == value
    assert not [name for name in vars(namespace) if "dsv4_topk" in name]


def test_off_keeps_upstreams(parse):
    parse("--dsv4-topk", "off", DSV4_PLUGIN="1")
    assert settings().topk == "off"


@pytest.mark.parametrize("word", ["off", "bf16"])
def test_in_a_configuration_file(parse, tmp_path, word):
    """SGLang's reader of ``--config`` passes ``off`` without quotes on as ``false``."""
    (tmp_path / "server.yaml").write_text(f"dsv4-topk: {word}\n")
    parse("--config", f"{tmp_path}/server.yaml", DSV4_PLUGIN="1")
    assert settings().topk == word


def test_without_the_flag_nothing_is_set(parse):
    parse("--tp-size", "2")
    assert "DSV4_TOPK" not in os.environ
    assert not settings().enabled


def test_a_wrong_value_is_a_usage_error(parse, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--dsv4-topk", "bf61")
    assert caught.value.code == 2
    assert "bf61" in capsys.readouterr().err


def test_the_kill_switch_wins(parse, caplog):
    parse("--dsv4-topk", "bf16", DSV4_PLUGIN="0")
    assert not settings().enabled
    assert "DSV4_PLUGIN=0" in caplog.text


def test_the_parser_made_twice_has_the_option_once(parse):
    parse()
    parse("--dsv4-topk", "bf16")


def test_sglang_serve_itself_knows_the_option(engine, monkeypatch, capsys):
    """The real command: it loads the plugins, then parses."""
    import sglang.cli.serve as cli
    import sglang.srt.plugins as plugins

    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    command = ["--model-type", "llm", "--model-path", "/nowhere", "--dsv4-topk", "bf61"]
    with pytest.raises(SystemExit) as caught:
        cli.serve(argparse.Namespace(), command)
    assert caught.value.code == 2
    assert "argument --dsv4-topk: invalid choice: 'bf61'" in capsys.readouterr().err


def test_a_spawned_process_has_what_the_flag_said(parse):
    """A scheduler process inherits the environment and loads the plugins first thing."""
    parse("--dsv4-topk", "fp32")
    code = (
        "from kits.sglang_engine import prepare; prepare()\n"
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.plugins.hook_registry import HookRegistry\n"
        "import dsv4_plugin; s = dsv4_plugin.settings()\n"
        "print(s.enabled, s.topk, sum('dsv4.indexer' in t for t in HookRegistry._patched))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    hooks = 4 if metadata.version("sglang") >= SINCE else 3
    assert done.stdout.splitlines()[-1:] == [f"True fp32 {hooks}"], done.stdout + done.stderr


def serve_command() -> list[str]:
    """The arguments of the server in examples/serve_sglang.sh, with its defaults put in."""
    text = (ROOT / "examples" / "serve_sglang.sh").read_text()
    (command,) = re.findall(r"^exec sglang serve (.*?)(?<!\\)$", text, re.M | re.S)
    words = shlex.split(command.replace("\\\n", " "))
    return [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in words if word != "$@"]


def test_the_flags_of_the_example_are_accepted(engine, load):
    from sglang.srt.server_args import ServerArgs

    load(DSV4_PLUGIN="")
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    words = serve_command()
    assert "--dsv4-topk" in words and "--model-path" in words
    namespace = parser.parse_args(words)
    assert namespace.tp_size == 4
    assert settings().topk == "auto" and settings().enabled
