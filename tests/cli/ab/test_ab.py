"""``dsv4-plugin ab`` from its command line to its files, against small servers and clients."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kits.packaging_tools import ROOT

from dsv4_plugin.cli.ab import servers
from dsv4_plugin.cli.ab.metrics import METRICS
from dsv4_plugin.cli.main import main

HERE = Path(__file__).parent
SERVER = shlex.join([sys.executable, str(HERE / "fake_server.py")])
CLIENT = shlex.join([sys.executable, str(HERE / "fake_client.py")])
LOAD = "in=8,out=6,n=4,c=2"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "POLL_S", 0.05)
    # Servers and clients are to use this tree, whatever is installed.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """Whatever a test does, no process that was started for it is alive after it."""
    yield
    assert left_behind(tmp_path) == []


def left_behind(folder: Path) -> list[str]:
    """The processes that have ``folder`` in their environment or command line, but not this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if state != "Z" and str(folder).encode() in text:
            found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def command(tmp_path: Path, port: int, *more: str, client: str = CLIENT) -> list[str]:
    return [
        "ab", "--out", str(tmp_path / "out"), f"--port={port}", f"--server-command={SERVER}",
        f"--client-command={client}", f"--workload={LOAD}", "--warmup-rounds=1", *more,
    ]  # fmt: skip


def document(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "ab.json").read_text())


def table(said: str) -> dict[str, str]:
    """Metric -> the rest of its line in the table."""
    names = {m.name for m in METRICS}
    return {n: line for line in said.splitlines() for n in names if line.startswith(f"{n} ")}


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "ab.svg"
    code = main([*command(tmp_path, port, "--warmup-rounds=4", "--tolerance=0.9",
                          "--runs=2", "--workload=in=16,out=3,n=2,c=1", f"--plot={plot}"),
                 "--", "--first-ms=20", "--token-ms=10", "--gain=0.5"])  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err + said.out
    data = document(tmp_path)
    assert data["complete"] and not data["refused"] and data["warnings"] == []

    # A B A B A B, each a new server, with the same seeds and commands on both sides.
    assert [s["side"] for s in data["servers"]] == list("ABABAB")
    assert {s["version"] for s in data["servers"]} == {"9.9.9"}
    seeds: dict[str, list[int]] = {"A": [], "B": []}
    for run in data["runs"]:
        seeds[run["side"]].append(run["seed"])
    assert seeds["A"] == seeds["B"] and len(set(seeds["A"])) == len(seeds["A"]) == 2 * 3 * 2
    assert data["sides"]["A"]["command"] == data["sides"]["B"]["command"]
    assert data["sides"]["A"]["env"]["DSV4_PLUGIN"] == "0"
    assert data["sides"]["B"]["env"]["DSV4_PLUGIN"] == "1"
    for log in (tmp_path / "out").glob("*/server.log"):
        assert "REPEATED" not in log.read_text(), "a prompt that was sent twice is in the cache"
    assert len(list((tmp_path / "out").glob("[ab][123]/server.log"))) == 6

    # Half the time with the plugin.
    rows = {(r["workload"], r["metric"]): r for r in data["summary"]}
    assert len(rows) == 2 * len(METRICS)
    row = rows["in=8,out=6,n=4,c=2", "TPOT mean"]
    assert len(row["a"]) == len(row["b"]) == 3
    assert 0.4 < row["ratio"] < 0.75 and row["low"] <= row["ratio"] <= row["high"]
    assert row["a_mean"] == pytest.approx(sum(row["a"]) / 3) and 9 < row["a_mean"] < 30
    assert rows["in=8,out=6,n=4,c=2", "output throughput"]["ratio"] > 1

    first, second, _, _ = said.out.splitlines()[-4:]
    assert re.fullmatch(rf"{LOAD}: TPOT mean -\d\d.\d % \[-.*\], 3 pairs: faster", first), first
    assert second.startswith("in=16,out=3,n=2,c=1: TPOT mean -")
    shown = table(said.out)
    assert "(better)" in shown["ITL mean"] and shown["TPOT mean"].endswith("  better")
    assert shown.keys() == {m.name for m in METRICS}
    assert "4 of 4" not in said.out and "24 of 24 generated texts are the same" in said.out
    assert "2 degrees of freedom" in said.out and "B: vllm 9.9.9" in said.out
    assert "at work in 1 process(es)" in data["sides"]["B"]["engagement"]["summary"]
    assert data["sides"]["A"]["engagement"]["processes"] == []

    # What a reader needs to repeat it.
    assert data["machine"]["commit"] and data["machine"]["date"] and data["machine"]["plugin"]
    assert set(data["sides"]["B"]["versions"]) >= {"torch", "vllm", "dsv4-plugin", "python"}
    assert data["sides"]["B"]["versions"]["dsv4-plugin"]
    assert data["client"]["first_command"][:2] == [sys.executable, str(HERE / "fake_client.py")]
    assert "<svg" in plot.read_text()[:1000]

    # The same table again, from the file.
    again = tmp_path / "again.png"
    assert main(["ab", "--from", str(tmp_path / "out" / "ab.json"), f"--plot={again}"]) == 0
    assert table(capsys.readouterr().out) == shown
    assert again.read_bytes().startswith(b"\x89PNG")


def test_both_at_once(tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(command(tmp_path, port, "--together", "--order=abba", "--figure=ITL p99"))
    said = capsys.readouterr()
    assert code == 0, said.err
    assert said.out.splitlines()[-2].startswith("ITL p99 ")
    data = document(tmp_path)
    assert data["figure"] == "ITL p99"
    assert [s["url"].rpartition(":")[2] for s in data["servers"]] == [str(port), str(port + 1)]
    assert "".join(r["side"] for r in data["runs"]) == "ABBAAB"
    assert "does not include the differences between starts" in said.out
    for log in (tmp_path / "out").glob("*/server.log"):
        assert "REPEATED" not in log.read_text()


class Running:
    """Two servers that `ab` has not started."""

    def __init__(self, folder: Path, port: int) -> None:
        self.urls = [f"http://127.0.0.1:{port + i}" for i in range(2)]
        self.folder = folder
        self.servers = []
        for i, name in enumerate("ab"):
            environ = {**os.environ, "DSV4_PLUGIN": str(i)}
            environ["DSV4_STATUS_DIR"] = str(folder / f"status-{name}")
            (folder / f"status-{name}").mkdir()
            with (folder / f"{name}.log").open("w") as log:
                self.servers.append(subprocess.Popen(
                    [*shlex.split(SERVER), f"--port={port + i}"], env=environ, stdout=log,
                    stderr=log,
                ))  # fmt: skip

    def command(self, *more: str) -> list[str]:
        return [
            "ab", "--out", str(self.folder / "out"), f"--url-a={self.urls[0]}",
            f"--url-b={self.urls[1]}", f"--client-command={CLIENT}", f"--workload={LOAD}",
            "--warmup-rounds=1", *more,
        ]  # fmt: skip

    def stop(self) -> None:
        for server in self.servers:
            server.kill()
            server.wait()


@pytest.fixture
def running(tmp_path: Path, port: int) -> Iterator[Running]:
    two = Running(tmp_path, port)
    yield two
    two.stop()


def test_servers_that_run_already(
    tmp_path: Path, running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [f"--log-{side}={tmp_path}/{side}.log" for side in "ab"]
    known += [f"--status-dir-{side}={tmp_path}/status-{side}" for side in "ab"]
    assert main(running.command(*known)) == 0, capsys.readouterr().err
    data = document(tmp_path)
    assert data["complete"] and "UNVERIFIED" not in capsys.readouterr().out
    assert data["sides"]["B"]["engagement"]["processes"][0]["pid"] == running.servers[1].pid
    assert all(server.poll() is None for server in running.servers), "they are not ab's to stop"


def test_the_log_of_a_running_server_is_weaker_and_the_report_says_so(
    tmp_path: Path, running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(running.command(f"--log-a={tmp_path}/a.log", f"--log-b={tmp_path}/b.log"))
    assert code == 0, capsys.readouterr().err
    assert "note: B: the log says that the plugin engaged; no counter" in capsys.readouterr().out


def test_running_servers_of_which_nothing_is_known(
    tmp_path: Path, running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(running.command()) == 2, "before anything is asked of them"
    assert "at work in A: name its status folder (--status-dir-a)" in capsys.readouterr().err
    assert main(running.command(f"--log-a={tmp_path}/a.log")) == 2
    assert "--status-dir-b" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(running.command("--trust-engagement")) == 0
    said = capsys.readouterr().out
    assert "note: A: that the plugin is off is UNVERIFIED" in said
    assert "note: B: that the plugin is at work is UNVERIFIED" in said
    verdicts = {row["verdict"] for row in document(tmp_path)["summary"]}
    assert verdicts <= {"higher", "lower", "undecided"}
    assert "better" not in said and "worse" not in said
    assert said.splitlines()[-2].startswith("TPOT mean ")
    assert said.splitlines()[-2].endswith(", and what ran is UNVERIFIED")


def test_a_plugin_at_work_in_a_is_found_before_the_warm_up(
    tmp_path: Path, running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "of-a.log").write_text("INFO dsv4 active in vLLM 9.9.9\n")
    known = [f"--log-a={tmp_path}/of-a.log", f"--log-b={tmp_path}/b.log"]
    assert main(running.command(*known)) == 3
    said = capsys.readouterr()
    assert "server A is meant to run without the plugin" in said.err
    assert document(tmp_path)["warmups"] == [] and "warm-up" not in said.out


def test_trust_does_not_go_against_what_is_seen(
    tmp_path: Path, running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = running.command("--trust-engagement", f"--log-a={tmp_path}/b.log")
    assert main(swapped) == 3
    assert "server A is meant to run without the plugin" in capsys.readouterr().err


REFUSED = {
    "no trace of it": (["--", "--engage=never"], "server B: nothing shows the plugin at work"),
    "a log line, no counter": (["--", "--engage=log"], "dsv4 active in vLLM 9.9.9"),
    "a part that failed": (["--", "--engage=failure"], "no kernel image"),
    "not in every worker": (["--workers=2"], "--workers is 2"),
    "at work in A": (["--env-a=DSV4_PLUGIN=1"], "server A is meant to run without the plugin"),
    "off in both": (["--env-b=DSV4_PLUGIN=0"], "server B: nothing shows the plugin at work"),
    "other prompts": (["--client-args=--mode 'other prompts'"], "not given the same prompts"),
}


@pytest.mark.parametrize("more,said", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(
    more: list[str], said: str, tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs went well and there is no number."""
    assert main(command(tmp_path, port, *more)) == 3
    shown = capsys.readouterr()
    assert "REFUSED" in shown.err and said in shown.err
    assert table(shown.out) == {}
    data = document(tmp_path)
    assert data["refused"] and not data["complete"] and data["summary"] == []
    assert said in data["error"]
    assert main(["ab", "--from", str(tmp_path / "out" / "ab.json")]) == 2


def test_two_settings_of_the_plugin_can_be_compared(tmp_path: Path, port: int) -> None:
    more = ["--env=DSV4_TOPK=fp32", "--env-a=DSV4_PLUGIN=1", "--expect-a=on",
            "--env-b=DSV4_TOPK=bf16", "--args-b=--gain 0.9"]  # fmt: skip
    assert main(command(tmp_path, port, *more)) == 0
    sides = document(tmp_path)["sides"]
    assert [sides[s]["asked_env"]["DSV4_TOPK"] for s in "AB"] == ["fp32", "bf16"]
    assert (
        sides["B"]["command"][-6:-4] == ["--gain", "0.9"] and "--gain" not in sides["A"]["command"]
    )


FAILED = {
    "the server ends at its start": (["--", "--die-at-start=3"], "", [
        "server A ended with exit code 3", "ValueError: no such model", "line 21\n"]),
    "the server is never healthy": (["--start-timeout=6", "--", "--never-healthy"], "", [
        "server A is not healthy after 6 s (HTTP 503"]),
    "the server ends under load": (["--", "--die-at-request=6"], "", [
        "server A ended with exit code 7", "illegal memory access"]),
    "a request fails": (["--", "--fail-at-request=6"], "", [
        "3 of 4 requests were completed, 1 failed", "HTTP Error 500"]),
    "the client ends badly": ([], "crash", [
        "client of A (w1-warm1) ended with exit code 1", "No module named 'vllm'"]),
    "the client takes too long": (["--run-timeout=1"], "hang", ["not done after 1 s"]),
    "the client writes nothing": ([], "no file", ["wrote no result that can be read"]),
    "the client writes half a file": ([], "half a file", ["wrote no result that can be read"]),
    "the client has other keys": ([], "old keys", ["the result has no median_tpot_ms"]),
    "there is no such program": (["--server-command=/no/such/program"], "", [
        "server A cannot be started", "/no/such/program"]),
}  # fmt: skip


@pytest.mark.parametrize("more,mode,said", FAILED.values(), ids=FAILED)
def test_what_goes_wrong(
    more: list[str], mode: str, said: list[str], tmp_path: Path, port: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    client = ["--client-args", f"--mode '{mode}'"] if mode else []
    assert main([*command(tmp_path, port), *client, *more]) == 1
    shown = capsys.readouterr()
    for text in said:
        assert text in shown.err
    assert "line 20\n" not in shown.err, "of a log the last 30 lines are shown"
    assert table(shown.out) == {}
    data = document(tmp_path)
    assert not data["complete"] and not data["refused"] and said[0] in data["error"]


def test_a_port_that_is_taken(
    tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert main(command(tmp_path, port)) == 1
    assert f"port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err


def test_warm_up_goes_on_until_it_is_steady(tmp_path: Path, port: int) -> None:
    """The first four requests are slow: the first round differs from the second."""
    more = ["--warmup-rounds=6", "--tolerance=0.5", "--warmup-prompts=4", "--",
            "--compile=4", "--first-ms=10"]  # fmt: skip
    assert main(command(tmp_path, port, *more)) == 0
    data = document(tmp_path)
    for warmup in data["warmups"]:
        rounds = [r["TTFT mean"] for r in warmup["rounds"]]
        assert warmup["settled"] and len(rounds) >= 3 and rounds[0] > 2 * rounds[-1]
    assert max(run["metrics"]["TTFT mean"] for run in data["runs"]) < 100


def test_what_never_settles_is_said(
    tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, port, "--warmup-rounds=2", "--tolerance=0")) == 0
    assert "note: a1: no two warm-up rounds" in capsys.readouterr().out


def test_a_stubborn_server_and_its_children_are_stopped(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dsv4_plugin.cli.ab import processes

    short = [(number, 0.3) for number, _ in processes.PATIENCE[:2]] + [(signal.SIGKILL, 10.0)]
    monkeypatch.setattr(processes, "PATIENCE", tuple(short))
    more = ["--client-args=--mode crash", "--", "--stubborn", "--children"]
    assert main(command(tmp_path, port, *more)) == 1
    assert "outlive SIGTERM" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["starting", "measuring"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_leaves_nothing(
    when: str, number: signal.Signals, tmp_path: Path, port: int
) -> None:
    more = ["--client-args=--mode hang"] if when == "measuring" else []
    more += ["--", "--children"] + ([] if more else ["--never-healthy"])
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv4_plugin", *command(tmp_path, port, *more)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        mark = tmp_path / "out" / "a1" / ("w1-warm1.log" if when == "measuring" else "server.log")
        end = time.monotonic() + 60
        while not mark.exists():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, said
    assert "interrupted; what was started has been stopped" in said
    assert left_behind(tmp_path) == []
    assert document(tmp_path)["complete"] is False


ASKED = {
    "A": ["--env=OPENAI_API_KEY=sesame1", "--args-a= --api-key sesame2 sesame3"],
    "B": ["--env-b=HF_TOKEN=sesame4", "--serve-args=-H 'Authorization: Bearer sesame5'",
          "--client-args= --api-key sesame6"],
}  # fmt: skip


@pytest.mark.parametrize("end", ["well", "the client ends badly", "dry"])
def test_no_secret_is_told(
    end: str, tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in the results file nor on the terminal, also not in the log that an error quotes."""
    echo = tmp_path / "echo.py"
    echo.write_text(
        "import os, runpy, sys\n"
        "print('args', sys.argv, os.environ.get('OPENAI_API_KEY'), os.environ.get('HF_TOKEN'))\n"
        "own = [a for a in sys.argv[2:] if 'sesame' not in a and a not in ('--api-key', '-H')]\n"
        "sys.argv = [sys.argv[1], *own]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    more = [*ASKED["A"], *ASKED["B"], "--", "--hf-token", "sesame7",
            '--extra={"token": "sesame8"}', "http://me:sesame9@h/?key=sesame10"]  # fmt: skip
    if end == "the client ends badly":
        more.insert(0, "--client-args=--mode crash --api-key sesame11")
    if end == "dry":
        more.insert(0, "--dry-run")
    given = [
        word.replace(sys.executable, f"{sys.executable} {echo}", 1) if "-command=" in word else word
        for word in command(tmp_path, port)
    ]
    main([*given, *more])
    said = capsys.readouterr()
    whole = said.out + said.err
    if end != "dry":
        file = (tmp_path / "out" / "ab.json").read_text()
        assert "***" in file
        whole += file
    assert [f"sesame{i}" for i in range(1, 12) if f"sesame{i}" in whole] == []


PROTOCOLS = {
    "TLS": "bytes([21, 3, 3, 0, 2, 2, 70])",
    "SSH": "b'SSH-2.0-x\\r\\n'",
    "half of an answer": "b'HTTP/1.1 '",
    "nothing": "b''",
    "an endless header": "b'HTTP/1.1 200 OK\\r\\n' + b'a: ' + b'x' * 100000",
}


@pytest.mark.parametrize("bytes_sent", PROTOCOLS.values(), ids=PROTOCOLS)
def test_what_does_not_speak_http_is_not_healthy(
    bytes_sent: str, tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "other.py"
    script.write_text(
        "import socket, sys\n"
        "s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen()\n"
        "while True:\n"
        "    p, _ = s.accept(); p.recv(1000)\n"
        "    try: p.sendall(" + bytes_sent.replace("\\\\", "\\") + ")\n"
        "    except OSError: pass\n"
        "    p.close()\n"
    )
    given = command(tmp_path, port, "--start-timeout=2")
    given[4] = f"--server-command={sys.executable} {script} {{port}}"
    assert main(given) == 1
    said = capsys.readouterr().err
    assert "server A is not healthy after 2 s (no answer" in said and "Traceback" not in said
    assert "not healthy" in document(tmp_path)["error"]


def test_the_table_on_a_terminal_without_unicode(tmp_path: Path, port: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsv4_plugin", *command(tmp_path, port, "--together")],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, cwd=ROOT, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"+- sd" in done.stdout and b"TPOT mean" in done.stdout


def test_a_reader_that_has_gone_ends_it_and_leaves_nothing(tmp_path: Path, port: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv4_plugin", *command(tmp_path, port)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    assert document(tmp_path)["complete"] is False


def test_an_odd_results_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ab.json"
    for text in ("{", "[]", '{"what": "ab"}', '{"what": "ab", "complete": true}',
                 '{"what": "ab", "complete": true, "machine": 5, "design": []}'):  # fmt: skip
        file.write_text(text)
        assert main(["ab", "--from", str(file)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(file) in said


USAGE = {
    "an address of no server": (["--url-a=foo", "--url-b=http://b"], "--url-a must be http://"),
    "a path that is none": (["--health=x"], "--health must begin with /"),
    "ports that are none": (["--together", "--port=65535"], "two ports up to 65535"),
    "one port for two": (["--together", "--port=8000", "--port-b=8000"], "two ports"),
    "a time that never comes": (["--start-timeout=nan"], "--start-timeout must be a number"),
    "so many rounds that seeds meet": (["--warmup-rounds=5000"], "from 0 to 4999"),
    "two pairs": (["--pairs=2"], "--pairs must be a whole number from 3 to 5000, got '2'"),
    "no run": (["--runs=0"], "--runs must be a whole number from 1 to 5000, got '0'"),
    "a workload of another form": (["--workload=8192"], "--workload '8192'"),
    "a negative length": (["--workload=in=-4"], "positive integer"),
    "a workload twice": ([f"--workload={LOAD}"], "given twice"),
    "an environment without a value": (["--env-b=DSV4_TOPK"], "--env-b must be NAME=VALUE"),
    "the status folder": (["--env=DSV4_STATUS_DIR=x"], "ab sets DSV4_STATUS_DIR"),
    "an open quote": (["--args-a='x"], '--args-a "\'x" cannot be split'),
    "one address": (["--url-a=http://a"], "--url-a and --url-b come together"),
    "the same address": (["--url-a=http://a", "--url-b=http://a/"], "the same server"),
    "two modes": (["--together", "--restart"], "exclude each other"),
    "running and started": (["--url-a=http://a", "--url-b=http://b"], "no server is started"),
    "the log of a server of ab's": (["--log-a=x"], "need --url-a and --url-b"),
    "no such figure": (["--figure=TPOT"], "--figure: invalid choice: 'TPOT'"),
    "an engine without a client": (
        ["--engine=tokenspeed", "--client-command="],
        "tokenspeed has no benchmark client",
    ),
    "no such client": (["--client-command=/no/such/x"], "there is no program /no/such/x"),
    "a client that is not installed": (
        [f"--client-command={sys.executable} -m vllmm.cli bench"],
        "vllmm is not installed in",
    ),
    "a plot of no known form": (["--plot=x.txt"], "must end in one of .png, .svg, .pdf"),
    "a plot in no folder": (["--plot=/no/such/folder/x.svg"], "there is no folder"),
}


@pytest.mark.parametrize("more,said", USAGE.values(), ids=USAGE)
def test_a_wrong_option(
    more: list[str], said: str, tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, port, *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty(
    tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert main(command(tmp_path, port)) == 2
    assert "must be an empty or new folder" in capsys.readouterr().err


def test_what_stands_after_the_dashes_is_for_ab_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--", "--json"]) == 2
    assert "unrecognized arguments: --json" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_dry_run_shows_the_engines_commands(
    engine: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """No value meets a shell: what looks like one is passed as it is."""
    weird = '--x=\'{"a": "$(touch y) ; `z` {model}"}\''
    code = main(["ab", "--dry-run", "--engine", engine, "--model", "org/m odel", "--python",
                 "/opt/py", f"--args-b={weird}", "--", "--tensor-parallel-size", "4"])  # fmt: skip
    said = capsys.readouterr().out
    a, b, client, order = [line for line in said.splitlines() if not line.startswith("   ")]
    assert code == 0
    assert said.count("   cannot be started here: there is no program /opt/py\n") == 3
    start = {"vllm": "vllm.entrypoints.cli.main serve 'org/m odel'",
             "sglang": "sglang.launch_server --model-path 'org/m odel'"}[engine]  # fmt: skip
    port = {"vllm": "8000", "sglang": "30000"}[engine]
    head = f"/opt/py -m {start} --tensor-parallel-size 4 "
    assert a == f"A: DSV4_PLUGIN=0 {head}--host 127.0.0.1 --port {port}"
    words = shlex.split(b.removeprefix("B: "))
    assert words[-5] == '--x={"a": "$(touch y) ; `z` {model}"}'
    bench = {"vllm": "vllm.entrypoints.cli.main bench serve --backend vllm",
             "sglang": "sglang.bench_serving --backend sglang"}[engine]  # fmt: skip
    assert client.startswith(f"client: /opt/py -m {bench} --base-url http://127.0.0.1:{port} ")
    assert order.startswith("restart: AB AB AB, 1 run(s)")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_example(engine: str, tmp_path: Path) -> None:
    shim = tmp_path / "bin" / "dsv4-plugin"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m dsv4_plugin "$@"\n')
    shim.chmod(0o755)
    environ = {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}", "TP": "2",
               "MODEL": "org/model", "PAIRS": "4", "OUT": "x"}  # fmt: skip
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / f"ab_{engine}.sh"), "--dry-run", "--", "--seed", "3"],
        env=environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if not line.startswith("   ")]
    tp = {"vllm": "--tensor-parallel-size", "sglang": "--tp-size"}[engine]
    assert f" {tp} 2 --seed 3 --host 127.0.0.1 --port " in lines[0] and "org/model" in lines[0]
    assert lines[3].startswith("restart: AB AB AB AB, 1 run(s) of in=65536,out=256,n=4,c=1, in=")


def test_a_client_of_ones_own(tmp_path: Path, port: int) -> None:
    """A command that names {result} gets no more options."""
    script = tmp_path / "mine.py"
    keys = [metric.keys[0] for metric in METRICS]
    script.write_text(
        "import json, sys\n"
        f"n, seed, result, url = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4]\n"
        "import urllib.request\n"
        "body = json.dumps({'prompt': str(seed), 'max_tokens': 1}).encode()\n"
        "urllib.request.urlopen(url + '/v1/completions', body).read()\n"
        f"data = dict.fromkeys({keys!r}, seed + n)\n"
        "json.dump({**data, 'completed': n}, open(result, 'w'))\n"
    )
    mine = f"{sys.executable} {script} {{num_prompts}} {{seed}} {{result}} {{url}}"
    assert main(command(tmp_path, port, client=mine)) == 0
    data = document(tmp_path)
    assert [run["metrics"]["TTFT mean"] for run in data["runs"]] == [
        4 + run["seed"] for run in data["runs"]
    ]
    assert all(row["ratio"] == 1 for row in data["summary"])


def test_secrets_are_not_written(tmp_path: Path, port: int) -> None:
    more = [
        "--env=VLLM_API_KEY=hunter2",
        "--args-a=--api-key hunter2",
        "--args-b=--hf-token=hunter2",
    ]
    main(["ab", "--dry-run", *command(tmp_path, port, *more)[1:]])
    main(command(tmp_path, port, *more))  # the fake server knows no such options and ends
    text = (tmp_path / "out" / "ab.json").read_text()
    assert "hunter2" not in text and text.count("***") >= 3
