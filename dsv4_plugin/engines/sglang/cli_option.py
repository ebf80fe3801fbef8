"""``--dsv4-topk`` on SGLang's command line (``sglang serve``, ``sglang.launch_server``)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

from dsv4_plugin import envs, log
from dsv4_plugin.engines.sglang import probe
from dsv4_plugin.engines.shared import seam

__all__ = ["OPTION", "add_cli_args", "target"]

OPTION = "--dsv4-topk"


class TopkAction(argparse.Action):
    """Put the value into the environment, which the scheduler processes inherit.

    It does not go to the namespace, because ``ServerArgs`` has no such field.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Set ``DSV4_TOPK`` and, unless the value is ``off``, ``DSV4_PLUGIN=1``."""
        if values == "off":
            envs.put("topk", "off")
        elif envs.switch(True):
            envs.put("topk", str(values))
        else:
            log.say(logging.WARNING, f"{OPTION} has no effect: DSV4_PLUGIN=0 is set")


def _word(text: str) -> str:
    """Return ``off`` for what SGLang makes of the bare word in a YAML file (``--config``)."""
    return "off" if text == "false" else text


def target() -> str | None:
    """Return what to hook, or None if SGLang's parser has another form."""
    option = next(record for record in probe.SEAMS if record.name == "flag")
    targets = seam.in_source(option).targets
    return targets[0] if targets else None


def add_cli_args(original: Callable[..., Any], parser: argparse.ArgumentParser, *rest: Any) -> Any:
    """Add the option after SGLang's own."""
    result = original(parser, *rest)
    if OPTION not in parser._option_string_actions:
        parser.add_argument(
            OPTION,
            action=TopkAction,
            type=_word,
            choices=envs.choices("topk"),
            default=argparse.SUPPRESS,
            dest=argparse.SUPPRESS,
            help="The dtype in which the sparse-attention indexer's top-k of dsv4_plugin selects; "
            "enables the plugin. off: SGLang's own top-k.",
        )
    return result
