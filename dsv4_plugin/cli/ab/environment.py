"""The environment of each side: its variables, and the versions that its Python has."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsv4_plugin.cli.checks.provenance import commit, gpus
from dsv4_plugin.cli.shared.run import UsageError
from dsv4_plugin.cli.shared.secrets import Secrets

__all__ = [
    "client_environ", "machine", "parse", "secrets_of", "server_environ", "startable", "told",
    "versions",
]  # fmt: skip

DEFAULTS = {"A": {"DSV4_PLUGIN": "0"}, "B": {"DSV4_PLUGIN": "1"}}
# The prefixes that a results file shows; the whole environment may hold secrets.
_TOLD = ("CUDA_", "DG_", "DSV4_", "NCCL_", "SGLANG_", "SGL_", "TORCH", "TRITON_", "VLLM_")
# The Python of a server runs this text, so it must stand alone.
_PROBE = """
import json, platform, sys
from importlib import metadata
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
try:
    import dsv4_plugin
    found["dsv4-plugin"] = dsv4_plugin.__version__
    from dsv4_plugin.cli.checks.provenance import commit
    found["dsv4-plugin commit"] = commit()
except Exception as error:
    found["dsv4-plugin"] = None
    found["dsv4-plugin error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def parse(entries: list[str], option: str) -> dict[str, str]:
    """Read ``NAME=VALUE`` entries.

    Raises:
        UsageError: no ``=``, no name, or ``DSV4_STATUS_DIR``, which ``ab`` sets for each server.
    """
    out = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        # the message does not quote it: it may be a secret value without its name
        if not equals or not name:
            raise UsageError(f"{option} must be NAME=VALUE, got one without a name or '='")
        if name == "DSV4_STATUS_DIR":
            raise UsageError(f"{option}: ab sets DSV4_STATUS_DIR, another folder for each server")
        out[name] = value
    return out


def server_environ(
    side: str, common: Mapping[str, str], own: Mapping[str, str], status: str
) -> dict[str, str]:
    """Return the environment of a server: this process's, then the user's variables."""
    return {**os.environ, **common, **DEFAULTS[side], **own, "DSV4_STATUS_DIR": status}


def client_environ(common: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the client: the same for both sides, with the plugin off."""
    environ = {**os.environ, **common, "DSV4_PLUGIN": "0"}
    environ.pop("DSV4_STATUS_DIR", None)
    return environ


def secrets_of(environs: Iterable[Mapping[str, str]], commands: Iterable[Sequence[str]]) -> Secrets:
    """Return the secrets of a run: of the user's variables and of this process's environment."""
    return Secrets([os.environ, *environs], commands)


def told(environ: Mapping[str, str], asked: Mapping[str, str], secrets: Secrets) -> dict[str, str]:
    """Return what a results file shows of an environment: the user's variables and prefixes."""
    return secrets.environ(
        {
            name: value
            for name, value in sorted(environ.items())
            if name in asked or name.startswith(_TOLD)
        }
    )


def versions(python: str, environ: Mapping[str, str], *distributions: str) -> dict[str, Any]:
    """Ask a Python for its installed versions; ``{"error": …}`` if it cannot be asked."""
    command = [python, "-c", _PROBE, *distributions]
    try:
        done = subprocess.run(
            command, env=dict(environ), capture_output=True, encoding="utf-8", errors="replace",
            timeout=60, check=True,
        )  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return {"error": f"{python} could not be asked: {error}"}


def startable(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return why a command cannot be started here, or an empty text.

    For ``PYTHON -m MODULE`` it looks for the package and does not import it.
    """
    python, dash, *rest = [*command, "", ""]
    if shutil.which(python, path=environ.get("PATH")) is None:
        return f"there is no program {python}"
    package = rest[0].partition(".")[0] if dash == "-m" else ""
    if package:
        find = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
        try:
            done = subprocess.run(
                [python, "-c", find, package], env=dict(environ), capture_output=True, timeout=60
            )
        except (OSError, subprocess.SubprocessError) as error:
            return f"{python} cannot be run: {error}"
        if done.returncode:
            return f"{package} is not installed in {python}"
    return ""


def machine() -> dict[str, Any]:
    """Return the machine and the version of this command that a run is made with."""
    import dsv4_plugin

    cards = gpus()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": cards[0]["name"] if cards else None,
        "driver": cards[0]["driver_version"] if cards else None,
        "gpus": cards,
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "plugin": dsv4_plugin.__version__,
        "commit": commit(),
        "python": platform.python_version(),
    }
