"""A release's own benchmark client, run as ``dsv4-plugin ab`` runs it, against a fake server.

It shows that the release has the options that ab passes, and that the result has the keys that ab
reads.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from kits.release_runner import ROOT

from dsv4_plugin.cli.ab import AbError
from dsv4_plugin.cli.ab.clients import Client
from dsv4_plugin.cli.ab.console import Console
from dsv4_plugin.cli.ab.engines import ENGINES, Workload
from dsv4_plugin.cli.ab.metrics import METRICS
from dsv4_plugin.cli.ab.servers import Server

LOAD = Workload(input_len=20, output_len=6, prompts=4, concurrency=2)
FAKE = ROOT / "tests" / "cli" / "ab" / "fake_server.py"
# A tokenizer of words w0, w1 …, which needs no download.
MAKE_TOKENIZER = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
words = {f"w{i}": i for i in range(1000)} | {"<unk>": 1000}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(sys.argv[1])
"""


def check(engine: str, python: Path, script: Path, paths: Sequence[Path], folder: Path) -> None:
    """Measure once, then once with a request that fails: a result, then an error."""
    dropped = ("DSV4_", "VLLM_", "SGLANG_", "PYTEST_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    environ |= {
        "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT, ROOT / "tests"))),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DSV4_PLUGIN": "0",
    }
    tokenizer = folder / "tokenizer"
    subprocess.run([python, "-c", MAKE_TOKENIZER, tokenizer], env=environ, check=True)
    console = Console()
    more = ["--tokenizer", str(tokenizer)]
    client = Client(
        ENGINES[engine], [str(python), str(script)], more, str(tokenizer), environ, 300.0, console
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with _served(port, folder, environ, console) as server:
        result = client.run(server, LOAD, 5, folder / "well")
        assert result.metrics.keys() == {metric.name for metric in METRICS}
        assert (result.completed, result.input_tokens, result.output_tokens) == (4, 4 * 20, 4 * 6)
        assert result.texts == (" w1" * 6,) * 4
        assert 0.5 < result.metrics["TTFT mean"] < 5000
        with pytest.raises(AbError, match=r"3 of 4 requests were completed, 1 failed"):
            client.run(server, LOAD, 6, folder / "failing")
        log = (folder / "server.log").read_text()
        assert "REPEATED" not in log, "another seed gives other prompts, none is sent twice"


@contextlib.contextmanager
def _served(port: int, folder: Path, environ: dict[str, str], console: Console) -> Iterator[Server]:
    server = Server(
        "A", f"http://127.0.0.1:{port}", console, log=folder / "server.log",
        command=[sys.executable, str(FAKE), "--port", str(port), "--fail-at-request", "6"],
        environ={**environ, "PYTHONPATH": str(ROOT), "DSV4_STATUS_DIR": str(folder)},
    )  # fmt: skip
    try:
        server.start(30.0)
        yield server
    finally:
        server.stop()
