"""``dsv4-plugin doctor``: what is installed here, what would run, and why not something better.

:func:`collect` gathers plain data, :func:`render` writes it for people. Whatever is missing or
broken is part of the answer, so nothing here raises; neither torch nor an engine has to be there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dsv4_plugin import envs
from dsv4_plugin.cli.shared.run import UsageError, interruptible
from dsv4_plugin.errors import SettingError

__all__ = ["collect", "render", "run", "run_engines"]

PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "tvm-ffi": "apache-tvm-ffi",
    "vllm": "vllm",
    "sglang": "sglang",
    "tokenspeed": "tokenspeed",
}
GROUPS = (
    "vllm.general_plugins",
    "sglang.srt.plugins",
    "tokenspeed.plugins",
    "tokenspeed_kernel.plugins",
)
# part of the report -> (what it is called, its distribution)
ENGINES = {
    "vllm": ("vLLM", "vllm"),
    "sglang": ("SGLang", "sglang"),
    "tokenspeed": ("TokenSpeed", "tokenspeed"),
}
SWITCHES = "`vllm serve --plugin dsv4`, `sglang serve --dsv4-topk auto` or `DSV4_PLUGIN=1`"
TOPK_K = 512  # the k of DeepSeek-V4
WIDTH = 96

Data = dict[str, Any]


def run_engines(specs: Sequence[str], as_json: bool = False, folder: Path | None = None) -> int:
    """Print the seams of releases that are not installed; without ``specs`` the newest of each.

    Returns:
        0 if every seam was found, 1 if one moved or a release cannot be had.

    Raises:
        UsageError: a spec is wrong.
    """
    from dsv4_plugin.cli.doctor import releases

    found: list[Data] = []
    with interruptible() as work:
        try:
            releases.matrix(specs or list(releases.ENGINES), folder, found)
        except releases.SpecError as error:
            raise UsageError(str(error)) from error
    print(json.dumps(found, indent=2) if as_json else releases.render(found), flush=True)
    work.end()
    whole = all(
        not release["error"]
        and release["seams"]
        and all(seam["where"] for seam in release["seams"].values())
        for release in found
    )
    return 0 if whole else 1


def run(as_json: bool = False) -> int:
    """Print the report.

    Returns:
        0 if the compiled kernels can serve here, 1 if the plugin would leave everything to the
        engine or to torch, 2 if a setting has a value it cannot have.
    """
    with contextlib.redirect_stdout(sys.stderr):  # an engine that is imported may log to stdout
        data = collect()
    print(json.dumps(data, indent=2) if as_json else render(data))
    return data["exit_code"]


def collect() -> Data:
    """Return everything the report says, as data that JSON can hold."""
    data: Data = {
        "versions": _guarded(_versions),
        "gpu": _guarded(_gpu),
        "library": _guarded(_library),
        "settings": _guarded(_settings),
        "unknown_variables": _guarded(_unknown_variables),
        "ops": _guarded(_ops),
        "entry_points": _guarded(_entry_points),
    }
    for engine in ENGINES:
        data[engine] = _guarded(functools.partial(_engine, engine))
    data["exit_code"], verdict = _verdict(data)
    data["verdict"] = verdict + _unread(data["unknown_variables"])
    return data


def _guarded(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except (Exception, SystemExit) as error:  # a broken package may raise anything
        return {"error": _said(error)}


@functools.cache
def _torch() -> tuple[Any, str]:
    """Return torch, or None and why it cannot be imported; a second try would say another thing."""
    try:
        import torch

        torch.cuda.is_available()  # a package that is not all there is imported, and has nothing
    except (Exception, SystemExit) as error:
        return None, f"torch cannot be imported ({_said(error)})"
    return torch, ""


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _versions() -> dict[str, str | None]:
    import dsv4_plugin

    versions: dict[str, str | None] = {
        "dsv4-plugin": dsv4_plugin.__version__,
        "python": platform.python_version(),
    }
    versions.update((name, _installed(package)) for name, package in PACKAGES.items())
    return versions


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> Data:
    torch, why = _torch()
    if torch is None:
        return {"devices": [], "why": why}
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch sees no GPU" if built else "this torch is built without CUDA"
        return {"devices": [], "why": why}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {"devices": devices, "why": None, "cuda": torch.version.cuda, "driver": _driver()}


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    return next((word for word in text.split() if word[:1].isdigit() and "." in word), None)


def _library() -> Data:
    path = Path(__file__).parents[1] / "_C.so"
    present = path.is_file()
    torch, broken = _torch()
    why: str | None = broken
    if torch is not None:
        try:
            from dsv4_plugin.kernels import cuda

            why = cuda.missing()
        except (Exception, SystemExit) as error:
            why = f"the loader cannot be imported ({_said(error)})"
    return {"file": path.name, "present": present, "loads": why is None, "why": why}


def _settings() -> dict[str, Data]:
    found = {}
    for variable in envs.VARIABLES:
        value = os.environ.get(variable.name, "").strip() or None
        error = None
        try:
            envs.parse({} if value is None else {variable.name: value})
        except SettingError as wrong:
            error = str(wrong)
        found[variable.name] = {
            "value": variable.default if value is None else value,
            "set": value is not None,
            "error": error,
        }
    return found


def _unknown_variables() -> dict[str, str | None]:
    return envs.unknown()


def _ops() -> Data:
    """Map every op to what a call on the first device would get, and why not what comes before."""
    torch, why = _torch()
    if torch is None:
        return {"error": why}
    from dsv4_plugin.ops import dispatch as backends

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    half, single = torch.bfloat16, torch.float32
    asked = {
        ("topk",): (half, torch.float16, single),
        ("read", "read_mxfp4", "gather"): (single, half),
        # From the third on they are what DeepSeek-V4.1 has besides.
        ("paged_logits", "ragged_logits", "block_maxima", "select_blocks", "candidate_logits",
         "candidate_logits_ragged", "select_candidates", "candidate_select"): (half, single),
        ("gather",): (torch.uint8,),  # the keys stay quantised, which is what engines ask for
    }  # fmt: skip
    calls = [
        backends.Call(op, device, dtype, TOPK_K if op == "topk" else 0)
        for ops, dtypes in asked.items()
        for op in ops
        for dtype in dtypes
    ]
    try:
        wish = envs.value("backend")
    except SettingError:
        wish = "auto"
    return {_call_name(call): _what_serves(backends, call, wish) for call in calls}


def _call_name(call: Any) -> str:
    dtype = str(call.dtype).removeprefix("torch.")
    return f"{call.op} {dtype}" + (f" k={call.k}" if call.k else "")


def _what_serves(backends: Any, call: Any, wish: str) -> Data:
    unmet = {name: backends.unmet(call, name) for name in backends.ORDER}
    auto = next((name for name in backends.ORDER if not unmet[name]), None)
    error = None
    try:
        backends.resolve(call)  # as an op does it, so that DSV4_BACKEND counts
    except SettingError:
        pass  # said once, beside the setting
    except Exception as refused:
        error = str(refused)
    return {
        "device": str(call.device),
        "auto": auto,
        "unmet": {name: reasons for name, reasons in unmet.items() if reasons},
        "asked_for": wish,
        "error": error,
    }


def _entry_points() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for group in GROUPS:
        points = metadata.entry_points(group=group, name="dsv4")
        found[group] = next((point.value for point in points), None)
    return found


def _engine(name: str) -> Data:
    """Look for the seams in the engine that is installed: reads its source, imports nothing."""
    from dsv4_plugin.engines.shared import source

    called, distribution = ENGINES[name]
    version = _installed(distribution)
    if version is None:
        return {"installed": False, "seams": {}, "why": f"{called} is not installed"}
    try:
        probe = importlib.import_module(f"dsv4_plugin.engines.{name}.probe")
        seams = source.shown(probe.look())
    except (Exception, SystemExit) as error:
        return {"installed": True, "seams": {}, "why": f"the probe failed: {_said(error)}"}
    return {"installed": True, "seams": seams, "why": None}


def _verdict(data: Data) -> tuple[int, str]:
    settings = data["settings"]
    if "error" in settings:
        return 1, f"the settings cannot be read: {settings['error']}"
    wrong = [row["error"] for row in settings.values() if isinstance(row, dict) and row["error"]]
    if wrong:
        return 2, f"a setting is wrong: {wrong[0]}"
    if settings["DSV4_PLUGIN"]["value"].strip() == "0":
        return 1, "DSV4_PLUGIN=0: the plugin changes nothing, whatever else asks for it"
    if "error" in data["ops"]:
        return 1, f"no op can run here: {data['ops']['error']}"
    ops = [row for row in data["ops"].values() if isinstance(row, dict)]
    refused = [row["error"] for row in ops if row["error"]]
    if refused:
        return 1, f"what is asked for cannot be had: {refused[0]}"
    if any(row["auto"] == "cuda" for row in ops):
        how = (
            "; `vllm serve --plugin dsv4`, `sglang serve --dsv4-topk auto` or DSV4_PLUGIN=1 engages"
        )
        how = "" if settings["DSV4_PLUGIN"]["value"] else f"{how} them"
        return 0, f"the compiled kernels can serve here{how}"
    why = _why_not_cuda(data)
    names = sorted({row["auto"] for row in ops if row["auto"]})
    if not names:
        return 1, f"{why}no implementation can run here"
    return 1, (
        f"{why}the ops run here on {' and '.join(names)}, and an engine's top-k would stay its own"
    )


def _unread(unknown: Data) -> str:
    """Return what a verdict adds for variables that nobody reads."""
    if not unknown or "error" in unknown:
        return ""
    names = ", ".join(
        f"{name} (did you mean {like}?)" if like else name for name, like in unknown.items()
    )
    return f"; nothing reads {names}"


def _why_not_cuda(data: Data) -> str:
    """Return what the compiled top-k lacks here, as the beginning of a sentence."""
    gpu, ops = data["gpu"], data["ops"]
    if gpu.get("devices") == []:
        return f"no GPU here ({gpu['why']}): "
    for name, row in ops.items():
        if name.startswith("topk ") and isinstance(row, dict) and row["unmet"].get("cuda"):
            return f"{'; '.join(row['unmet']['cuda'])}: "
    return ""


def render(data: Data) -> str:
    """Write the report of :func:`collect` in lines of at most some 100 columns."""
    lines = ["versions"]
    lines += _rows(_plain(data["versions"], lambda value: value or "not installed"))
    lines += ["", "GPU", *_rows(_gpu_rows(data["gpu"]))]
    lines += ["", "compiled kernels", *_rows([_library_row(data["library"])])]
    lines += ["", "settings", *_rows(_setting_rows(data))]
    lines += ["", "what `auto` takes here", *_rows(_op_rows(data["ops"]))]
    lines += ["", "entry points"]
    lines += _rows(_plain(data["entry_points"], lambda value: value or "not registered"))
    for engine, (called, _) in ENGINES.items():
        lines += ["", f"seams in {called}", *_rows(_seam_rows(data[engine]))]
    mark = {0: "ok", 1: "note", 2: "error"}[data["exit_code"]]
    lines += ["", f"{mark}: {data['verdict']}"]
    return "\n".join(lines)


Row = tuple[str, str]


def _rows(rows: list[Row]) -> list[str]:
    """Align names and texts, and fold long texts under their own column."""
    width = max((len(name) for name, _ in rows), default=0) + 2
    lines = []
    for name, text in rows:
        folded = textwrap.wrap(text, WIDTH - width - 2) or [""]
        lines.append(f"  {name:<{width}}{folded[0]}".rstrip())
        lines += [" " * (width + 2) + line for line in folded[1:]]
    return lines


def _plain(part: Data, say: Callable[[Any], str]) -> list[Row]:
    return [(name, say(value)) for name, value in part.items()]


def _gpu_rows(gpu: Data) -> list[Row]:
    if "error" in gpu:
        return [("error", gpu["error"])]
    if not gpu["devices"]:
        return [("none", gpu["why"])]
    rows = [
        (
            f"cuda:{index}",
            f"{device['name']}, compute capability {device['capability']}, "
            f"{device['multiprocessors']} SMs, {device['memory_gib']} GiB",
        )
        for index, device in enumerate(gpu["devices"])
    ]
    driver = gpu["driver"] or "of unknown version"
    return [*rows, ("driver", f"{driver}; torch is built for CUDA {gpu['cuda']}")]


def _library_row(library: Data) -> Row:
    if "error" in library:
        return ("error", library["error"])
    return (library["file"], "loads" if library["loads"] else library["why"])


def _setting_rows(data: Data) -> list[Row]:
    settings, unknown = data["settings"], data["unknown_variables"]
    rows = []
    for name, row in settings.items():
        if not isinstance(row, dict):
            rows.append((name, str(row)))
        elif row["error"]:
            rows.append((name, f"WRONG: {row['error']}"))
        else:
            source = "" if row["set"] else " (default)"
            rows.append((name, f"{row['value'] or 'unset'}{source}"))
    if "error" in unknown:
        return [*rows, ("error", unknown["error"])]
    for name, like in unknown.items():
        hint = f"; did you mean {like}?" if like else ""
        rows.append((name, f"UNKNOWN: nothing reads this variable{hint}"))
    return rows


def _op_rows(ops: Data) -> list[Row]:
    rows: list[Row] = []
    seen: set[str] = set()
    for name, row in ops.items():
        if not isinstance(row, dict):
            rows.append((name, str(row)))
            continue
        text = f"{row['auto'] or 'nothing'} on {row['device']}"
        if row["error"]:
            text = f"REFUSED: {row['error']}"
        rows.append((name, text))
        seen.update(
            f"not {backend}: {reason}"
            for backend, reasons in row["unmet"].items()
            for reason in reasons
            if f"has no {backend} implementation" not in reason
        )
    return rows + [("", reason) for reason in sorted(seen)]


def _seam_rows(engine: Data) -> list[Row]:
    if "error" in engine:
        return [("error", engine["error"])]
    if not engine["seams"]:
        return [("none", engine["why"] or "the probe found nothing")]
    return [
        (name, seam["where"] or f"not found: {seam['why']}")
        for name, seam in engine["seams"].items()
    ]
