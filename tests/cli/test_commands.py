"""All commands end in the same way: by a signal, a closed pipe, a stream without Unicode.

Each command runs in a process of its own, as a user starts it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kits.e2e_servers import FAKE, free_ports, tiny_model
from kits.packaging_tools import ROOT

CLI = ["dsv4_plugin"]
TOOL = "benchmarks."
FUZZ, SOAK = ["tests.fuzz"], [TOOL + "soak"]
RESULTS = ROOT / "benchmarks" / "results" / "h200_topk.json"
SMALL = ["--rows", "1", "--columns", "600", "--k", "16"]

# Every command in a form that ends soon without a GPU, a server or the network.
COMMANDS = {
    "help": [*CLI, "--help"],
    "doctor": [*CLI, "doctor"],
    "doctor json": [*CLI, "doctor", "--json"],
    "doctor engines": [*CLI, "doctor", "--engines", "vllm@/"],
    "ab help": [*CLI, "ab", "--help"],
    "bench topk": [*CLI, "bench", "topk", "--device", "cpu", *SMALL],
    "bench chain": [*CLI, "bench", "chain", "--device", "cpu", *SMALL],
    "recall": [*CLI, "recall", "--device", "cpu", *SMALL],
    "fuzz": [*FUZZ, "--device", "cpu", "--cases", "3", "--backend", "torch"],
    "soak": [*SOAK, "--device", "cpu", "--minutes", "0.02"],
    **{n: [TOOL + "tables", n] for n in ("readme", "sglang", "logits", "modes", "settings")},
}
# Those that run for as long as one likes: (arguments, lines of output before they are at work).
LONG = {
    "bench topk": ([*CLI, "bench", "topk", "--device", "cpu", "--rows", "32", "128"], 1),
    "bench logits": (
        [*CLI, "bench", "logits", "--device", "cpu", "--rows", "32", "--columns", "65536"], 1,
    ),
    "bench chain": (
        [*CLI, "bench", "chain", "--device", "cpu", "--rows", "32", "--columns", "65536"], 1,
    ),
    "engines": ([TOOL + "engines", "--part", "kernels", "--device", "cpu"], 1),
    "recall": ([*CLI, "recall", "--device", "cpu"], 1),
    "fuzz": ([*FUZZ, "--device", "cpu", "--backend", "torch"], 1),
    "soak": ([*SOAK, "--device", "cpu"], 1),
}  # fmt: skip


def heeds_signals() -> None:
    """A caller's nohup, or a shell's &, must not reach the command: it would ignore them, too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(
    command: list[str], stdout: int | None = subprocess.PIPE, **environ: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", *command], stdout=stdout, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ}, preexec_fn=heeds_signals,
    )  # fmt: skip


def one_line(said: str) -> bool:
    return said.count("\n") == 1 and "Traceback" not in said and "Exception" not in said


@pytest.mark.parametrize(
    ("name", "number"),
    [*((name, signal.SIGINT) for name in LONG), ("fuzz", signal.SIGTERM), ("soak", signal.SIGHUP)],
)
def test_a_signal_ends_a_long_run(name: str, number: signal.Signals, tmp_path: Path) -> None:
    command, lines = LONG[name]
    file = tmp_path / "results.json"
    run = start([*command, "--json", str(file)])
    try:
        assert run.stdout is not None
        for _ in range(lines):
            assert run.stdout.readline()
        assert json.loads(file.read_text())["complete"] is False, "written before the work"
        run.send_signal(number)
        _, said = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 128 + number, said
    assert one_line(said) and ": interrupted" in said
    assert json.loads(file.read_text())["complete"] is False


def test_an_interrupted_look_at_releases_prints_whole_json(tmp_path: Path) -> None:
    """pip hangs in place of downloading; what was looked at is there, the other is marked."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w').close()\nimport time\ntime.sleep(100)\n"
    )
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    run = start([*CLI, "doctor", "--engines", "sglang@/", "vllm", "--json"], PYTHONPATH=path)
    try:
        while not (tmp_path / "mark").exists():
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        out, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130 and one_line(said), said
    assert [(r["engine"], r["complete"]) for r in json.loads(out)] == [
        ("sglang", True), ("vllm", False),
    ]  # fmt: skip


@pytest.mark.parametrize("module", ["server", "server.drills"])
def test_interrupted_servers_are_stopped(module: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    run = start([
        TOOL + module, "--model", str(tiny_model(tmp_path / "model")), "--json", str(file),
        "--folder", str(tmp_path / "run"), "--server-command", FAKE, "--port", str(free_ports(14)),
    ], FAKE_HANGS="40")  # fmt: skip
    try:
        while not list(tmp_path.glob("run/*/serve.log")):
            assert run.poll() is None
        assert json.loads(file.read_text())["complete"] is False
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 130 and one_line(said), said
    assert json.loads(file.read_text())["complete"] is False
    commands = map(text, Path("/proc").glob("[0-9]*/cmdline"))
    assert [command for command in commands if str(tmp_path) in command] == []


def text(file: Path) -> str:
    try:
        return file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_reader_that_has_gone_is_no_traceback(command: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)  # as `| head` leaves it
    run = start(command, stdout=write)
    os.close(write)
    _, said = run.communicate(timeout=120)
    assert said == "" and run.returncode in (0, 128 + signal.SIGPIPE), said


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_stream_without_unicode(command: list[str]) -> None:
    plain, rich = (
        start(command, PYTHONIOENCODING=encoding) for encoding in ("ascii", "utf-8")
    )  # fmt: skip
    out, said = plain.communicate(timeout=120)
    rich.communicate(timeout=120)
    assert out.isascii() and "Traceback" not in said, said
    assert plain.returncode == rich.returncode


@pytest.mark.parametrize("command", ["doctor", "fuzz", "readme"])
def test_a_full_disk_under_the_output_is_one_line(command: str) -> None:
    with open("/dev/full", "w") as full:
        run = start(COMMANDS[command], stdout=full.fileno())
        _, said = run.communicate(timeout=120)
    assert run.returncode == 1 and one_line(said) and "No space left" in said


BROKEN = {
    "a library": "OSError('libcudart.so.13: cannot open shared object file')",
    "a clash": "AttributeError('partially initialized module')",
    "an exit": "SystemExit(3)",
    "nothing": "ImportError('no libtorch')",
}


@pytest.fixture(params=BROKEN, scope="module")
def broken_torch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH on which importing torch fails."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(f"raise {BROKEN[request.param]}\n")
    return os.pathsep.join((str(folder), str(ROOT)))


@pytest.mark.parametrize(
    "command",
    [
        [*CLI, "bench", "topk"], FUZZ, [*CLI, "recall"], SOAK,
        [TOOL + "tuning.sweep"], [TOOL + "engines", "--part", "forward", "--engine", "sglang"],
    ],
    ids=lambda command: command[-1],
)  # fmt: skip
def test_a_broken_torch_is_one_line(command: list[str], broken_torch: str) -> None:
    run = start(command, PYTHONPATH=broken_torch)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 2 and one_line(said) and "torch cannot be imported (" in said


@pytest.mark.parametrize("json_wanted", [False, True])
def test_a_broken_torch_is_a_finding_of_doctor(json_wanted: bool, broken_torch: str) -> None:
    run = start([*CLI, "doctor", *["--json"][:json_wanted]], PYTHONPATH=broken_torch)
    out, said = run.communicate(timeout=60)
    assert run.returncode == 1 and said == ""
    verdict = json.loads(out)["verdict"] if json_wanted else out.splitlines()[-2]
    assert "no op can run here: torch cannot be imported (" in verdict


LAZY = [
    ["--version"], ["--help"], [], ["nope"], ["ab", "--help"], ["bench", "--help"],
    ["bench", "topk", "--rows", "0"], ["recall", "--k", "4096"], ["doctor", "--folder", "x"],
    ["bench", "plot", str(RESULTS), "--plot", "OUT.svg"],
]  # fmt: skip
LAZY_TOOLS = [
    [*FUZZ, "--help"], [*FUZZ, "--op", "topkk"], [*FUZZ, "--bogus"], [*SOAK, "--help"],
    [*SOAK, "--minutes", "nan"],
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [*([*CLI, *given] for given in LAZY), *LAZY_TOOLS], ids=" ".join
)
def test_torch_is_imported_by_what_needs_it(arguments: list[str], tmp_path: Path) -> None:
    """A line of its own is made with an exception that no command may swallow."""
    (tmp_path / "torch.py").write_text("import os\nos.write(2, b'IMPORTED')\nos._exit(99)\n")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    given = [word.replace("OUT", str(tmp_path / "x")) for word in arguments]
    run = start(given, PYTHONPATH=path)
    _, said = run.communicate(timeout=60)
    assert run.returncode in (0, 2) and "IMPORTED" not in said


def test_without_a_command_there_is_help() -> None:
    run = start(CLI)
    out, said = run.communicate(timeout=60)
    assert run.returncode == 2 and said == ""
    assert out.startswith("usage: dsv4-plugin") and "doctor" in out


def test_the_words_of_the_options_are_those_of_the_code() -> None:
    """Options are read without torch, so what they choose among stands in a file of its own."""
    from benchmarks.engines.choices import ADAPTERS
    from benchmarks.engines.kernels.side import CELLS
    from dsv4_plugin.cli.bench import upstream as installed
    from dsv4_plugin.cli.shared import choices
    from dsv4_plugin.kernels.arguments import MAX_K
    from tests.fuzz import command, engine

    assert max(choices.KS) == MAX_K
    assert tuple(engine.OPS) == command.FUZZED
    assert tuple(installed.ENGINES) == choices.ENGINES
    assert tuple(CELLS) == ADAPTERS
    for name, module in installed.ENGINES.items():
        assert module.__name__.endswith(f".{name}_peers")
