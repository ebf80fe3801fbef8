"""The engines: how their servers start, and the options of their benchmark clients."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_plugin.cli.ab import AbError
from dsv4_plugin.cli.shared import numbers
from dsv4_plugin.cli.shared.run import UsageError

__all__ = [
    "ENGINES", "Engine", "Workload", "client_command", "load_result", "server_command", "split",
]  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What one run of the client sends: lengths in tokens, number of prompts, how many at once."""

    input_len: int
    output_len: int
    prompts: int
    concurrency: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Read ``in=8192,out=128,n=16,c=4``; a missing key has the default value.

        Raises:
            UsageError: an unknown key, or a value that is no positive integer.
        """
        values = {"in": 8192, "out": 128, "n": 16, "c": 4}
        for part in filter(None, text.split(",")):
            key, _, value = part.partition("=")
            try:
                number = numbers.LENGTH(value)
            except UsageError:
                number = 0
            if key not in values or not number:
                raise UsageError(
                    f"--workload {text!r}: {part!r} is not one of in=, out=, n=, c= with a "
                    "positive integer (as in in=8192,out=128,n=16,c=4)"
                )
            values[key] = number
        return cls(values["in"], values["out"], values["n"], values["c"])

    def __str__(self) -> str:
        return f"in={self.input_len},out={self.output_len},n={self.prompts},c={self.concurrency}"


@dataclass(frozen=True)
class Engine:
    """``distribution`` is the name of the installed package."""

    distribution: str
    port: int
    server: tuple[str, ...]  # Python's arguments before the model
    client: tuple[str, ...]  # Python's arguments; empty if the engine has no client
    flags: Callable[[str, str | None, Workload, int, Path], list[str]]
    read: Callable[[Path], Any]


def _vllm_flags(url: str, model: str | None, load: Workload, seed: int, result: Path) -> list[str]:
    return [
        "--backend", "vllm", "--base-url", url, *(["--model", model] if model else []),
        "--dataset-name", "random", "--random-input-len", str(load.input_len),
        "--random-output-len", str(load.output_len), "--num-prompts", str(load.prompts),
        "--max-concurrency", str(load.concurrency), "--seed", str(seed),
        "--ignore-eos", "--temperature", "0", "--percentile-metrics", "ttft,tpot,itl",
        "--metric-percentiles", "99", "--disable-tqdm", "--save-result", "--save-detailed",
        "--result-dir", str(result.parent), "--result-filename", result.name,
    ]  # fmt: skip


def _sglang_flags(
    url: str, model: str | None, load: Workload, seed: int, result: Path
) -> list[str]:
    # random-ids downloads nothing. A ratio of 1 gives every prompt the full length. The client's
    # own warm-up would send the first prompt twice, and the prefix cache would answer it.
    return [
        "--backend", "sglang", "--base-url", url, *(["--model", model] if model else []),
        "--dataset-name", "random-ids", "--random-input-len", str(load.input_len),
        "--random-output-len", str(load.output_len), "--random-range-ratio", "1.0",
        "--num-prompts", str(load.prompts), "--max-concurrency", str(load.concurrency),
        "--seed", str(seed), "--warmup-requests", "0", "--disable-tqdm", "--output-details",
        "--output-file", str(result),
    ]  # fmt: skip


def _one(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _last_line(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8").splitlines()[-1])


ENGINES: Mapping[str, Engine] = {
    "vllm": Engine(
        "vllm", 8000, ("-m", "vllm.entrypoints.cli.main", "serve"),
        ("-m", "vllm.entrypoints.cli.main", "bench", "serve"), _vllm_flags, _one,
    ),
    "sglang": Engine(
        "sglang", 30000, ("-m", "sglang.launch_server", "--model-path"),
        ("-m", "sglang.bench_serving"), _sglang_flags, _last_line,
    ),
    # TokenSpeed has no client. Its server speaks OpenAI's protocol, so vLLM's client can ask it.
    "tokenspeed": Engine(
        "tokenspeed", 8000, ("-m", "tokenspeed.cli", "serve", "--model"), (), _vllm_flags, _one
    ),
}  # fmt: skip


def split(text: str, option: str) -> list[str]:
    """Split an option's value as a shell would; no shell is involved.

    Raises:
        UsageError: a quote is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r} cannot be split: {error}") from error


def _fill(command: Sequence[str], values: Mapping[str, object]) -> list[str]:
    """Put values into ``{name}``; other braces (JSON) stay as they are."""
    out = []
    for part in command:
        for name, value in values.items():
            part = part.replace("{" + name + "}", str(value))
        out.append(part)
    return out


def server_command(command: Sequence[str], more: Sequence[str], host: str, port: int) -> list[str]:
    """Return the command of a server: ``{host}`` and ``{port}`` filled in, or added as options."""
    whole = [*command, *more]
    if not any("{port}" in part for part in whole):
        whole += ["--host", host, "--port", str(port)]
    return _fill(whole, {"host": host, "port": port})


def client_command(
    engine: Engine, command: Sequence[str], more: Sequence[str], url: str, model: str | None,
    load: Workload, seed: int, result: Path,
) -> list[str]:  # fmt: skip
    """Return the command of a client; one that contains ``{result}`` gets no more options."""
    whole = list(command)
    if not any("{result}" in part for part in whole):
        whole += engine.flags(url, model, load, seed, result)
    values = {
        "url": url, "model": model or "", "seed": seed, "result": result,
        "input_len": load.input_len, "output_len": load.output_len,
        "num_prompts": load.prompts, "concurrency": load.concurrency,
    }  # fmt: skip
    return _fill([*whole, *more], values)


def load_result(engine: Engine, file: Path, what: str) -> Any:
    """Return the document that a client wrote.

    Raises:
        AbError: there is no document, or it is no JSON object.
    """
    try:
        document = engine.read(file)
    except (OSError, ValueError, IndexError, RecursionError) as error:
        raise AbError(f"{what} wrote no result that can be read to {file}: {error}") from error
    if not isinstance(document, dict):
        raise AbError(f"{what} wrote no JSON object to {file}")
    return document
