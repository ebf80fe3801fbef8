"""Every setting of the plugin: the one module that reads ``DSV4_*`` from the environment.

A setting has a variable, a type, a default and a meaning, all in :data:`VARIABLES`. The table in
``docs/settings.md`` is generated from it (``python -m benchmarks.tables settings``), and a test
compares the two.

An engine may override the environment for one model through its own configuration
(vLLM: ``--additional-config.dsv4.topk bf16``): see :func:`override`. The kill switch
``DSV4_PLUGIN=0`` cannot be overridden.

A variable with an empty value counts as unset. A wrong value is an error where the setting counts.
In an engine the settings count only if the plugin was switched on (:func:`asked`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsv4_plugin.errors import SettingError

__all__ = [
    "OTHER_VARIABLES",
    "VARIABLES",
    "Settings",
    "Variable",
    "asked",
    "choices",
    "killed",
    "origins",
    "override",
    "parse",
    "put",
    "settings",
    "switch",
    "unknown",
    "value",
]


@dataclass(frozen=True)
class Variable:
    """One setting: its variable, the values it can have (the first is the default), its meaning.

    ``path``: the setting can also be any absolute path.
    """

    name: str
    field: str
    choices: tuple[str, ...]
    default: str
    meaning: str
    path: bool = False


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "DSV4_PLUGIN",
        "plugin",
        ("", "0", "1"),
        "",
        "`1` switches the plugin on (`vllm serve --plugin dsv4` and `sglang serve --dsv4-topk` set "
        "it). `0` is the kill switch: the plugin patches nothing, whatever else asks for it. "
        "Unset: the plugin is installed but inert.",
    ),
    Variable(
        "DSV4_TOPK",
        "topk",
        ("auto", "bf16", "fp16", "fp32", "off"),
        "auto",
        "The dtype in which the top-k selects. `auto`: bf16 for DeepSeek-V4 and V4.1 if index "
        "logits are available in bf16 (see `DSV4_LOGITS`), else exact float32; in float32 the "
        "engine's own kernel gets the calls in which it was measured to be faster "
        "([docs/kernels.md](docs/kernels.md#what-auto-leaves-to-the-engine)). `bf16`, `fp16`, "
        "`fp32`: this dtype, by the plugin in every call, or an error when the layer is built or "
        "first called. `off`: the engine's own top-k.",
    ),
    Variable(
        "DSV4_LOGITS",
        "logits",
        ("auto", "engine", "plugin"),
        "auto",
        "Who computes the index logits that the top-k selects on. `auto`: in bf16 and fp16 the "
        "plugin's own kernel if it can, else the engine's DeepGEMM if that writes this dtype "
        "(SGLang's prefill in bf16: DeepGEMM first); in fp32 the engine. `engine`: the engine. "
        "`plugin`: the plugin, or an error when the layer is built or first called.",
    ),
    Variable(
        "DSV4_INDEXER_READ",
        "indexer_read",
        ("auto", "triton", "torch", "off"),
        "auto",
        "Which code gathers the keys from the FP8 indexer cache for prefill (vLLM, TokenSpeed). "
        "`off`: the engine's own.",
    ),
    Variable(
        "DSV4_BACKEND",
        "backend",
        ("auto", "cuda", "triton", "torch"),
        "auto",
        "Which implementation of an op runs. `auto`: the first of cuda, triton, torch that "
        "supports the call; inside an engine the engine's own CUDA kernel comes before torch. "
        "Other values: this implementation or an error, for every op that has such an "
        "implementation.",
    ),
    Variable(
        "DSV4_SHARD_PREFILL",
        "shard_prefill",
        ("0", "1"),
        "0",
        "`1` shards the rows of a long prefill among the tensor-parallel ranks: each rank scores "
        "and selects its slice, and one gather for each layer brings all indices to all ranks "
        "([vLLM](docs/vllm.md#rows-sharded-among-ranks), "
        "[SGLang](docs/sglang.md#rows-sharded-among-ranks)). Where the plugin cannot do that, one "
        "error has every reason. It ran with two ranks on a CPU, and never on two GPUs.",
    ),
    Variable(
        "DSV4_STRICT",
        "strict",
        ("0", "1"),
        "0",
        "`1` turns every fallback to the engine's own code into an error when the layer is built "
        "or first called: a layer that is not eligible, or a missing seam (a place in the engine "
        "that the plugin patches). In SGLang a missing seam can only be an ERROR line in the log.",
    ),
    Variable(
        "DSV4_SHADOW",
        "shadow",
        ("0", "1"),
        "0",
        "`1` runs the engine's own selection beside the plugin's on the same scores and reports in "
        "the log how far they agree ([docs/shadow.md](docs/shadow.md)). The plugin's answer is "
        "served; every call takes longer.",
    ),
    Variable(
        "DSV4_LOG",
        "log",
        ("info", "debug", "warning", "error"),
        "info",
        "How much the plugin logs. `debug`: every setting and its origin, every seam and patch, "
        "and every decision for a layer or an op with its reasons, each once per process "
        "([docs/troubleshooting.md](docs/troubleshooting.md#everything-in-the-log)).",
    ),
    Variable(
        "DSV4_STATUS_DIR",
        "status_dir",
        ("",),
        "",
        "A directory. Every process in which the plugin is at work writes its counters there, "
        "one small JSON file per process (`dsv4-plugin ab` reads them), and the engine's "
        "`/metrics` shows them ([docs/metrics.md](docs/metrics.md)). Unset: no file is written.",
        path=True,
    ),
)
_BY_FIELD = {v.field: v for v in VARIABLES}
# Variables that are read while building, testing or by make, not by the plugin at run time.
OTHER_VARIABLES = (
    "DSV4_BUILD_CUDA",
    "DSV4_CI",
    "DSV4_CUDA_ARCHS",
    "DSV4_ENGINES_ENV",
    "DSV4_SGLANG_VERSIONS",
    "DSV4_TOKENSPEED_VERSIONS",
    "DSV4_VLLM_ENV",
    "DSV4_VLLM_VERSIONS",
)


@dataclass(frozen=True)
class Settings:
    """The settings in force. ``plugin`` is ``None`` if ``DSV4_PLUGIN`` is unset."""

    plugin: bool | None = None
    topk: str = "auto"
    logits: str = "auto"
    indexer_read: str = "auto"
    backend: str = "auto"
    shard_prefill: bool = False
    strict: bool = False
    shadow: bool = False
    log: str = "info"
    status_dir: str = ""

    @property
    def enabled(self) -> bool:
        """Whether the plugin may replace anything."""
        return bool(self.plugin)


_FLAGS: dict[str, bool | None] = {"": None, "0": False, "1": True}


def _convert(variable: Variable, value: str, source: str) -> Any:
    if variable.path and os.path.isabs(value.strip()):
        return value.strip()
    text = value.strip().lower() or variable.default
    if text not in variable.choices:
        allowed = ", ".join(repr(c) if c else "unset" for c in variable.choices)
        allowed += ", or an absolute path" if variable.path else ""
        raise SettingError(f"{source} is {value!r}; it can be {allowed}")
    return _FLAGS[text] if "1" in variable.choices else text


def _of(variable: Variable, environ: Mapping[str, str]) -> Any:
    return _convert(variable, environ.get(variable.name, ""), variable.name)


def parse(environ: Mapping[str, str]) -> Settings:
    """Build :class:`Settings` from a mapping of environment variables.

    Raises:
        SettingError: variables have values that are not allowed; the message names each of them.
    """
    values, wrong = {}, []
    for variable in VARIABLES:
        try:
            values[variable.field] = _of(variable, environ)
        except SettingError as error:
            wrong.append(str(error))
    if wrong:
        raise SettingError("; ".join(wrong))
    return Settings(**values)


_override: dict[str, Any] = {}
_put: set[str] = set()  # the variables that an engine's command line set in this process
_cache: tuple[tuple[str | None, ...], dict[str, Any], Settings] | None = None


def settings() -> Settings:
    """Return the settings in force: the environment, overridden by the engine's configuration.

    The environment is read on every call (a handful of dictionary reads). So a change that is made
    before an engine starts its workers counts for them and for this process.

    Raises:
        SettingError: variables have values that are not allowed; the message names each of them.
    """
    global _cache
    raw = tuple(os.environ.get(v.name) for v in VARIABLES)
    if _cache is not None and _cache[0] == raw and _cache[1] is _override:
        return _cache[2]
    base = parse(os.environ)
    result = replace(base, **_override)
    if base.plugin is False:
        result = replace(result, plugin=False)
    _cache = (raw, _override, result)
    return result


def value(field: str) -> Any:
    """Return one setting in force, whatever the values of the others.

    Raises:
        SettingError: this setting has a value that is not allowed.
    """
    return _override[field] if field in _override else _of(_BY_FIELD[field], os.environ)


def killed() -> bool:
    """Whether ``DSV4_PLUGIN=0`` is set; the answer is right even if another setting is wrong."""
    return os.environ.get(_BY_FIELD["plugin"].name, "").strip() == "0"


def asked() -> bool:
    """Whether the plugin was switched on; a wrong ``DSV4_PLUGIN`` does not switch it on."""
    try:
        return bool(value("plugin")) and not killed()
    except SettingError:
        return False


def switch(on: bool) -> bool:
    """Switch the plugin on or off for this process and those it starts.

    Returns:
        False if nothing was changed because the kill switch ``DSV4_PLUGIN=0`` is set.
    """
    if on and killed():
        return False
    os.environ[_BY_FIELD["plugin"].name] = "1" if on else "0"
    _put.add("plugin")
    return True


def choices(field: str) -> tuple[str, ...]:
    """Return the values that a setting can have."""
    return tuple(choice for choice in _BY_FIELD[field].choices if choice)


def put(field: str, value: str) -> None:
    """Set one variable for this process and those it starts (used by an engine's command line).

    Raises:
        SettingError: the setting cannot have this value.
    """
    variable = _BY_FIELD[field]
    _convert(variable, value, variable.name)
    os.environ[variable.name] = value
    _put.add(field)


def override(config: Mapping[str, Any] | None) -> list[str]:
    """Put an engine's own configuration over the environment; ``None`` removes it again.

    ``config`` maps lower-case names (``plugin``, ``topk``, ``indexer_read`` …) to the values of the
    variables of that name. If it names anything, the plugin is switched on unless ``plugin`` says
    otherwise. A name with an empty value is ignored. YAML reads the words ``off`` and ``no`` as
    False, so False means ``off`` for a setting that has this value.

    Returns:
        What is wrong in a configuration that leaves the plugin off; there it is no error.

    Raises:
        SettingError: unknown names, or values that are not allowed.
    """
    global _override
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for key, value in (config or {}).items():
        variable = _BY_FIELD.get(str(key))
        if variable is None:
            wrong.append(
                f"additional_config['dsv4'] has the unknown name {key!r}; "
                f"it can have {', '.join(sorted(_BY_FIELD))}"
            )
        elif text := _text(variable, value).strip():
            try:
                source = f"additional_config['dsv4'][{key!r}]"
                values[variable.field] = _convert(variable, text, source)
            except SettingError as error:
                wrong.append(str(error))
    if wrong and values.get("plugin") is not False:
        raise SettingError("; ".join(wrong))
    if values:
        values.setdefault("plugin", True)
    _override = values
    return wrong


def _text(variable: Variable, value: Any) -> str:
    """Return a value of an engine's configuration as the text of an environment variable."""
    if isinstance(value, bool):
        if "1" in variable.choices:
            return str(int(value))
        if not value and "off" in variable.choices:
            return "off"
    return str(value)


def origins() -> dict[str, tuple[str, str]]:
    """Return the value in force of every variable, as text, and where it came from; never raises.

    The origin "the command line" is known only in the process that parsed the command line. The
    processes that it starts see an environment variable.
    """
    found = {}
    for v in VARIABLES:
        text, source = os.environ.get(v.name, "").strip(), "the environment"
        if v.field in _put:
            source = "the command line"
        if v.field in _override and not (v.field == "plugin" and killed()):
            value = _override[v.field]
            text = next((t for t, flag in _FLAGS.items() if flag is value), str(value))
            source = "additional_config['dsv4']"
        if not text:
            text, source = v.default, "the default"
        else:
            try:
                _convert(v, text, v.name)
            except SettingError:
                source += ", where it is wrong"
        found[v.name] = (text or "unset", source)
    return found


def unknown() -> dict[str, str | None]:
    """Map every ``DSV4_*`` variable that is not a setting to the setting it looks like."""
    import difflib

    known = [variable.name for variable in VARIABLES]
    return {
        name: next(iter(difflib.get_close_matches(name, known, 1)), None)
        for name in sorted(os.environ)
        if name.startswith("DSV4_") and name not in known and name not in OTHER_VARIABLES
    }
