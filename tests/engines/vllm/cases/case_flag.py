"""``--plugin`` on vLLM's own command lines, and how its value reaches other processes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys

import pytest

RAY = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"


@pytest.fixture(scope="module")
def arg_utils():
    from vllm import platforms

    if platforms.current_platform.is_unspecified():
        from vllm.platforms.cpu import CpuPlatform

        platforms.current_platform = CpuPlatform()  # as `vllm bench` does itself
    return importlib.import_module("vllm.engine.arg_utils")


@pytest.fixture
def parsers(arg_utils, engine, monkeypatch):
    """The parsers of the three commands, built the way the commands build them."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.delenv(RAY, raising=False)
    found = {}
    for name in (
        "vllm.entrypoints.common.cli_args",
        "vllm.entrypoints.launchers.cli_args",
        "vllm.entrypoints.openai.cli_args",
    ):
        try:
            make = importlib.import_module(name).make_arg_parser
        except (ImportError, AttributeError):
            continue
        found["serve"] = make(FlexibleArgumentParser())
        break
    for bench in ("latency", "throughput"):
        parser = FlexibleArgumentParser()
        importlib.import_module(f"vllm.benchmarks.{bench}").add_cli_args(parser)
        found[f"bench {bench}"] = parser
    assert set(found) == {"serve", "bench latency", "bench throughput"}
    yield found
    for name in ("DSV4_PLUGIN", RAY):
        os.environ.pop(name, None)


COMMANDS = ("serve", "bench latency", "bench throughput")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flag_switches_on(parsers, command):
    model = ["some/model"] if command == "serve" else []
    namespace = parsers[command].parse_args([*model, "--plugin", "dsv4"])
    assert os.environ["DSV4_PLUGIN"] == "1"
    assert "DSV4_" in os.environ[RAY].split(",")
    assert not {"plugin", "plugins"} & set(vars(namespace))
    assert not [key for key in vars(namespace) if "dsv4" in key.lower() or "SUPPRESS" in key]


@pytest.mark.parametrize("value", ["dsv4,dsv4", " dsv4 "])
def test_a_comma_list(parsers, value):
    parsers["serve"].parse_args(["m", "--plugin", value])
    assert os.environ["DSV4_PLUGIN"] == "1"
    assert os.environ[RAY] == "DSV4_"


def test_what_ray_copies_already_stays(parsers, monkeypatch):
    os.environ[RAY] = "MY_,DSV4_"
    parsers["serve"].parse_args(["m", "--plugin", "dsv4"])
    assert os.environ[RAY] == "MY_,DSV4_"
    from vllm.ray.ray_env import get_env_vars_to_copy

    assert "DSV4_PLUGIN" in get_env_vars_to_copy()


def test_none_switches_off(parsers):
    os.environ["DSV4_PLUGIN"] = "1"
    parsers["serve"].parse_args(["m", "--plugin", "none"])
    assert os.environ["DSV4_PLUGIN"] == "0"


def test_the_kill_switch_wins_over_the_flag(parsers):
    os.environ["DSV4_PLUGIN"] = "0"
    parsers["serve"].parse_args(["m", "--plugin", "dsv4"])
    assert os.environ["DSV4_PLUGIN"] == "0"


def test_without_the_flag_nothing_is_set(parsers):
    parsers["serve"].parse_args(["m"])
    assert "DSV4_PLUGIN" not in os.environ
    assert RAY not in os.environ


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", ["dsv5", "dsv4,nope", "", "none,dsv4"])
def test_an_unknown_name_is_argparses_own_error(parsers, command, value, capsys):
    model = ["some/model"] if command == "serve" else []
    with pytest.raises(SystemExit) as caught:
        parsers[command].parse_args([*model, "--plugin", value])
    assert caught.value.code == 2
    assert "--plugin" in capsys.readouterr().err
    assert "DSV4_PLUGIN" not in os.environ


def test_the_engines_arguments_are_those_without_the_flag(parsers, arg_utils):
    """vLLM passes every key of the namespace to a front end that knows none of the plugin's."""
    plain = vars(parsers["serve"].parse_args(["m"]))
    flagged = vars(parsers["serve"].parse_args(["m", "--plugin", "dsv4"]))
    assert set(plain) == set(flagged)


def test_dotted_additional_config(parsers, arg_utils):
    namespace = parsers["serve"].parse_args(
        ["m", "--plugin", "dsv4", "--additional-config.dsv4.topk", "bf16"]
    )
    engine_args = arg_utils.AsyncEngineArgs.from_cli_args(namespace)
    assert engine_args.additional_config == {"dsv4": {"topk": "bf16"}}


def test_the_flag_goes_with_the_plugin(arg_utils, engine):
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from dsv4_plugin.engines.vllm import register, unregister

    patched = vars(arg_utils.EngineArgs)["add_cli_args"]
    unregister()
    original = vars(arg_utils.EngineArgs)["add_cli_args"]
    assert original is not patched
    parser = arg_utils.EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert "--plugin" not in parser._option_string_actions
    register()
    register()
    parser = arg_utils.EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert "--plugin" in parser._option_string_actions
    unregister()
    assert vars(arg_utils.EngineArgs)["add_cli_args"] is original


def test_an_upstream_option_of_that_name_is_left_alone(arg_utils, engine):
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    action = parser.add_argument("--plugin")
    arg_utils.EngineArgs.add_cli_args(parser)
    assert parser._option_string_actions["--plugin"] is action


def test_vllm_plugins_is_an_allow_list(monkeypatch):
    """A VLLM_PLUGINS without dsv4 excludes the plugin, as the documentation says."""
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    from dsv4_plugin.engines.vllm import register

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert load_plugins_by_group(DEFAULT_PLUGINS_GROUP)["dsv4"] is register
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    assert "dsv4" not in load_plugins_by_group(DEFAULT_PLUGINS_GROUP)


def _child(queue) -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from dsv4_plugin import settings
    from dsv4_plugin.engines.shared.import_hooks import _finder

    queue.put((settings().enabled, sorted(_finder.pending), INDEXER in sys.modules))


INDEXER = "vllm.model_executor.layers.sparse_attn_indexer"


def test_a_spawned_process_is_switched_on(parsers):
    """Engine core and workers are spawned after parsing, and load plugins themselves."""
    parsers["serve"].parse_args(["m", "--plugin", "dsv4"])
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    enabled, pending, loaded = queue.get()
    assert enabled
    assert INDEXER in pending
    assert not loaded
