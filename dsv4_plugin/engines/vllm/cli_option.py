"""``--plugin dsv4`` on vLLM's command line (``serve``, ``bench latency``, ``bench throughput``)."""

from __future__ import annotations

import argparse
import functools
import logging
import os
from typing import Any

from dsv4_plugin import envs, log
from dsv4_plugin.engines.shared.patches import Ledger

__all__ = ["KNOWN", "install", "uninstall"]

KNOWN = ("dsv4", "none")
_RAY = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
_ledger = Ledger()


class PluginAction(argparse.Action):
    """Switch the plugin on, or with ``none`` off, for this process and those that it starts.

    The value goes to the environment, which engine core and workers inherit. It does not go to the
    namespace, because vLLM passes on every key of it and knows no key of the plugin.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Parse a comma list; an unknown name is an ordinary usage error."""
        names = [name.strip() for name in str(values).split(",")]
        unknown = sorted({name for name in names if name not in KNOWN})
        if unknown:
            raise argparse.ArgumentError(
                self, f"unknown plugin {', '.join(map(repr, unknown))} (choose from dsv4, none)"
            )
        if "none" in names:
            if "dsv4" in names:
                raise argparse.ArgumentError(self, "'none' cannot be combined with 'dsv4'")
            envs.switch(False)
            return
        if not envs.switch(True):
            log.say(logging.WARNING, "--plugin dsv4 has no effect: DSV4_PLUGIN=0 is set")
            return
        # Ray copies variables by prefix; it needs to be told the plugin's prefix.
        prefixes = [p for p in os.environ.get(_RAY, "").split(",") if p]
        if "DSV4_" not in prefixes:
            os.environ[_RAY] = ",".join([*prefixes, "DSV4_"])


def install(arg_utils: Any) -> None:
    """Wrap ``EngineArgs.add_cli_args`` of ``vllm.engine.arg_utils``.

    Why: vLLM has no option that enables a plugin, and an unknown option ends the command.
    It can go when vLLM has its own option that chooses a plugin. If vLLM adds a ``--plugin``, the
    adapter leaves it alone.
    """
    owner = arg_utils.EngineArgs
    if _ledger.patches:
        return
    original = owner.add_cli_args

    @functools.wraps(original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        if "--plugin" not in parser._option_string_actions:
            parser.add_argument(
                "--plugin",
                action=PluginAction,
                default=argparse.SUPPRESS,
                dest=argparse.SUPPRESS,
                metavar="NAME[,NAME]",
                help="Enable an out-of-tree plugin: dsv4 (exact, fast sparse-attention indexer "
                "for DeepSeek-V4 and V3.2), or none.",
            )
        return parser

    _ledger.replace(owner, "add_cli_args", staticmethod(add_cli_args), "EngineArgs.add_cli_args")


def uninstall() -> None:
    """Remove the option."""
    _ledger.restore()
