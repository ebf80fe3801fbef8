"""``dsv4-plugin doctor``: what is installed, what would run, and why nothing faster.

:func:`collect` gathers plain data, and :func:`render` makes the text. Missing and broken parts
belong to the answer, so nothing here raises. Neither torch nor an engine needs to be installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dsv4_plugin import envs
from dsv4_plugin.cli.shared import outputs, screen
from dsv4_plugin.cli.shared.run import UsageError, interruptible
from dsv4_plugin.errors import SettingError
from dsv4_plugin.facts import LIBRARY

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
# part of the report -> (its name, its distribution)
ENGINES = {
    "vllm": ("vLLM", "vllm"),
    "sglang": ("SGLang", "sglang"),
    "tokenspeed": ("TokenSpeed", "tokenspeed"),
}
SWITCHES = (
    "`vllm serve --plugin dsv4`, `sglang serve --dsv4-topk auto`, or DSV4_PLUGIN=1 for any engine"
)
TOPK_K = 512  # the k of DeepSeek-V4
WIDTH = 100
MOST = 4  # rows of a part that the short report shows

Data = dict[str, Any]


def run_engines(specs: Sequence[str], as_json: bool = False, folder: Path | None = None) -> int:
    """Print the seams of releases that are not installed; without ``specs``, of the newest ones.

    Returns:
        0 if every seam was found, 1 if a seam moved or a release cannot be downloaded.

    Raises:
        UsageError: a spec is wrong.
    """
    from dsv4_plugin.cli.doctor import releases

    found: list[Data] = []
    with interruptible() as work:
        try:
            releases.matrix(specs or list(releases.ENGINES), folder, found, _say_to_a_person)
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


def _say_to_a_person(line: str) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def run(as_json: bool = False, everything: bool = False) -> int:
    """Print the short report, or with ``everything`` the whole report.

    Returns:
        0 if the compiled kernels can serve here, 1 if the plugin would leave everything to the
        engine or to torch, 2 if a setting has a forbidden value.
    """
    with contextlib.redirect_stdout(sys.stderr):  # an imported engine may log to stdout
        data = collect()
    print(json.dumps(data, indent=2) if as_json else render(data, everything))
    return data["exit_code"]


def collect() -> Data:
    """Return all contents of the report as data that JSON can hold."""
    data: Data = {
        "versions": _guarded(_versions),
        "gpu": _guarded(_gpu),
        "library": _guarded(_library),
        "check": _guarded(_check),
        "settings": _guarded(_settings),
        "unknown_variables": _guarded(_unknown_variables),
        "status_dir": _guarded(_status_dir),
        "ops": _guarded(_ops),
        "aside": _guarded(_aside),
        "entry_points": _guarded(_entry_points),
    }
    for engine in ENGINES:
        data[engine] = _guarded(functools.partial(_engine, engine))
    data["exit_code"], verdict, data["next"] = _verdict(data)
    data["verdict"] = verdict + _unread(data["unknown_variables"])
    if data["status_dir"]:
        data["verdict"] += f"; no status can be written: {data['status_dir']}"
    return data


def _guarded(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except (Exception, SystemExit) as error:  # a broken package can raise anything
        return {"error": _said(error)}


@functools.cache
def _torch() -> tuple[Any, str]:
    """Return torch, or None and the import error; a second import would give another error."""
    try:
        import torch

        torch.cuda.is_available()  # an incomplete torch can be imported but has no members
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
    torch, broken = _torch()
    why: str | None = broken
    if torch is not None:
        try:
            from dsv4_plugin.kernels import cuda

            why = cuda.missing()
        except (Exception, SystemExit) as error:
            why = f"the loader cannot be imported ({_said(error)})"
    return {"file": LIBRARY.name, "present": LIBRARY.is_file(), "loads": why is None, "why": why}


def _check(device: str = "cuda:0", backend: str = "cuda") -> Data:
    """Run one top-k with the compiled kernels, and compare it with the torch reference."""
    torch, why = _torch()
    why = why or ("" if torch.cuda.is_available() or device == "cpu" else "there is no GPU")
    if not why:
        from dsv4_plugin.ops import dispatch as backends

        call = backends.Call("topk", torch.device(device), torch.bfloat16, TOPK_K)
        why = "; ".join(backends.unmet(call, backend))
    if why:
        return {"ran": False, "exact": None, "why": why}
    import dsv4_plugin

    logits = torch.randn(2, 8192, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    lengths = torch.tensor([8192, 5000], dtype=torch.int32, device=device)
    got, want = (
        dsv4_plugin.topk(logits, lengths, TOPK_K, backend=one).sort(dim=1).values.cpu()
        for one in (backend, "torch")
    )
    return {"ran": True, "exact": bool(torch.equal(got, want)), "why": None}


def _status_dir() -> str | None:
    """Return why no status can be written to DSV4_STATUS_DIR, if that is set."""
    value = os.environ.get("DSV4_STATUS_DIR", "").strip()
    try:
        if value:
            outputs.folder(value)
    except UsageError as error:
        return f"DSV4_STATUS_DIR {value} {error}"
    return None


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
    """Map every op to what serves a call on the first device, and why no better one does."""
    torch, why = _torch()
    if torch is None:
        return {"error": why}
    from dsv4_plugin.ops import dispatch as backends

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    half, single = torch.bfloat16, torch.float32
    asked = {
        ("topk",): (half, torch.float16, single),
        ("read", "read_mxfp4", "gather"): (single, half),
        # From the third entry on, these are the extra ops of DeepSeek-V4.1.
        ("paged_logits", "ragged_logits", "block_maxima", "select_blocks", "candidate_logits",
         "candidate_logits_ragged", "select_candidates", "candidate_select"): (half, single),
        ("gather",): (torch.uint8,),  # the keys stay quantised, as the engines ask for them
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
        backends.resolve(call)  # resolved as an op resolves it, so that DSV4_BACKEND counts
    except SettingError:
        pass  # the row of the setting already shows this
    except Exception as refused:
        error = str(refused)
    return {
        "device": str(call.device),
        "auto": auto,
        "unmet": {name: reasons for name, reasons in unmet.items() if reasons},
        "asked_for": wish,
        "error": error,
    }


def _aside() -> dict[str, dict[str, list[int]]]:
    """Map each engine to the calls that ``auto`` leaves to its own kernel, and for which k."""
    torch, why = _torch()
    if torch is None:
        raise ImportError(why)
    from dsv4_plugin.engines.shared import aside

    return {name: {what: [*ks] for what, ks in aside.shapes(name).items()} for name in ENGINES}


def _entry_points() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for group in GROUPS:
        points = metadata.entry_points(group=group, name="dsv4")
        found[group] = next((point.value for point in points), None)
    return found


def _engine(name: str) -> Data:
    """Look for the seams in the installed engine; it reads the source and imports nothing."""
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


def _verdict(data: Data) -> tuple[int, str, str]:
    """Return the exit code, the verdict, and what to do next."""
    settings = data["settings"]
    report = "report this with the output of `dsv4-plugin doctor --json`"
    if "error" in settings:
        return 1, f"the settings cannot be read: {settings['error']}", report
    for name, row in settings.items():
        if isinstance(row, dict) and row["error"]:
            return 2, f"a setting is wrong: {row['error']}", f"correct {name}, or unset it"
    if settings["DSV4_PLUGIN"]["value"].strip() == "0":
        said = "DSV4_PLUGIN=0: the plugin changes nothing, whatever else asks for it"
        return 1, said, "unset DSV4_PLUGIN to use the plugin"
    if "error" in data["ops"]:
        said = f"no op can run here: {data['ops']['error']}"
        return 1, said, "run doctor in the Python that runs the engine; it has torch"
    ops = [row for row in data["ops"].values() if isinstance(row, dict)]
    refused = [row["error"] for row in ops if row["error"]]
    if refused:
        said = f"the requested backend is not available: {refused[0]}"
        return 1, said, f"unset DSV4_BACKEND, or else: {_mend(data)}"
    check = data["check"]
    broken = check.get("error") or (check.get("exact") is False and "its answer is not exact")
    if any(row["auto"] == "cuda" for row in ops) and broken:
        said = f"the compiled top-k was tried on this GPU and failed: {broken}"
        return 1, said, f"{report}; set DSV4_PLUGIN=0 until then"
    if any(row["auto"] == "cuda" for row in ops):
        start = "start the engine" if settings["DSV4_PLUGIN"]["value"] else SWITCHES
        return 0, "the compiled kernels can serve here", f"{start}; then `dsv4-plugin status URL`"
    why = _why_not_cuda(data)
    names = sorted({row["auto"] for row in ops if row["auto"]})
    if not names:
        return 1, f"{why}no implementation can run here", report
    said = f"{why}the ops run here on {' and '.join(names)}, and an engine would keep its own top-k"
    return 1, said, _mend(data)


def _mend(data: Data) -> str:
    """Return how this machine can get the compiled kernels."""
    from dsv4_plugin.kernels.cuda import CAPABILITIES, REPAIR

    fitting = {f"{major}.{minor}" for major, minor in CAPABILITIES}
    devices = data["gpu"].get("devices") or []
    build = f"in a checkout, with nvcc on PATH: `{REPAIR}`"
    present = data["library"].get("present")
    if not any(device.get("capability") in fitting for device in devices):
        want = " or ".join(sorted(fitting))
        there = "run doctor on the machine of the engine: the kernels need compute capability "
        there += want
        return there if devices or present else f"{build}; then {there}"
    if not present:
        return build
    if not data["library"].get("loads"):
        return f"`pip install --force-reinstall apache-tvm-ffi`; if that does not help: `{REPAIR}`"
    return (
        "set CUDA_VISIBLE_DEVICES so that this GPU is the first"
        if len(devices) > 1
        else ("see the reasons above")
    )


def _unread(unknown: Data) -> str:
    """Return what a verdict adds for variables that are not settings."""
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
        library = "" if data["library"].get("present") else " and no kernels in this installation"
        return f"no GPU here ({gpu['why']}){library}: "
    for name, row in ops.items():
        if name.startswith("topk ") and isinstance(row, dict) and row["unmet"].get("cuda"):
            return f"{'; '.join(row['unmet']['cuda'])}: "
    return ""


def render(data: Data, everything: bool = False) -> str:
    """Write the report of :func:`collect`: the short form, or ``everything``.

    On a terminal the lines fit its width. Elsewhere the last two lines are the verdict and the next
    step.
    """
    width = screen.columns()
    lines = _everything(data, width or WIDTH) if everything else _screen(data, width or WIDTH)
    mark = {0: "ok", 1: "note", 2: "error"}[data["exit_code"]]
    lines += ["", *screen.fold(data["verdict"], f"{mark}: ", width)]
    return "\n".join([*lines, *screen.fold(data["next"], "next: ", width)])


Row = tuple[str, str]


def _everything(data: Data, width: int) -> list[str]:
    parts = {
        "versions": _plain(data["versions"], lambda value: value or "not installed"),
        "GPU": _gpu_rows(data["gpu"]),
        "compiled kernels": [_library_row(data["library"]), _check_row(data["check"])],
        "settings": _setting_rows(data),
        "what `auto` takes here": _op_rows(data["ops"]),
        "what `auto` leaves to the engines": _aside_rows(data["aside"]),
        "entry points": _plain(data["entry_points"], lambda value: value or "not registered"),
        **{f"seams in {called}": _seam_rows(data[e]) for e, (called, _) in ENGINES.items()},
    }
    lines: list[str] = []
    for title, rows in parts.items():
        lines += [*[""][: len(lines)], title]
        lines += [f"  {line}" for line in screen.pairs(rows, width - 2)]
    return lines


def _screen(data: Data, width: int) -> list[str]:
    """Return the short report: versions, GPU, library, settings, and what the engine keeps."""
    versions, points = data["versions"], data["entry_points"]
    there = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    named = [row for row in _setting_rows(data) if not row[1].endswith(" (default)")]
    absent = [name for name, value in points.items() if not value]
    registered = points.get("error") or (
        f"not registered: {', '.join(absent)}" if absent else "registered"
    )
    rows = [
        ("versions", there),
        *(("GPU", text if name == "none" else f"{name} {text}") for name, text in
          _gpu_rows(data["gpu"])[:MOST]),
        _library_row(data["library"]),
        _check_row(data["check"]),
        *(named[:MOST] or [("settings", "all at their defaults")]),
        *_short(_op_rows(data["ops"])),
        *(("left to engines", why) for name, why in data["aside"].items() if name == "error"),
        ("entry points", registered),
    ]  # fmt: skip
    for engine, (called, _) in ENGINES.items():
        seams = _seam_rows(data[engine])
        moved = [f"{name}: {why}" for name, why in seams if why.startswith("not found")]
        if not data[engine].get("seams"):
            rows.append((called, seams[0][1]))
        else:
            found = f"{versions.get(engine)}: {len(seams) - len(moved)} of {len(seams)} seams found"
            rows.append((called, "; ".join([found, *moved])))
    return [*screen.pairs(rows, width), "(everything: dsv4-plugin doctor --all)"]


def _short(rows: list[Row]) -> list[Row]:
    """Return one row for all ops that the same implementation serves, then why not a better one."""
    of: dict[str, list[str]] = {}
    for name, text in rows:
        if name:
            of.setdefault(text, []).append(name.split()[0])
    ops = [("ops", f"{text}: {', '.join(dict.fromkeys(names))}") for text, names in of.items()]
    reasons = [row for row in rows if not row[0] and "compiled library" not in row[1]]
    return [*ops[:MOST], *reasons[:MOST]]  # the library has its own row


def _plain(part: Data, say: Callable[[Any], str]) -> list[Row]:
    return [(name, say(value)) for name, value in part.items()]


def _aside_rows(aside: Data) -> list[Row]:
    if "error" in aside:
        return [("error", aside["error"])]
    return [
        (called, f"k {', '.join(map(str, ks))}: {what}")
        for engine, (called, _) in ENGINES.items()
        for what, ks in aside[engine].items()
    ] or [("none", "the plugin serves every call")]


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


def _check_row(check: Data) -> Row:
    if check.get("ran"):
        right = "the same answer as" if check["exact"] else "ANOTHER answer than"
        return ("check", f"one top-k by the kernels on the GPU: {right} torch")
    return (
        "check",
        f"FAILED: {check['error']}" if "error" in check else f"not run: {check['why']}",
    )


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
    if data["status_dir"]:
        rows.append(("DSV4_STATUS_DIR", f"NO STATUS: {data['status_dir']}"))
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
