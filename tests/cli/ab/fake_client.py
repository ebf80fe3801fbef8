"""A small ``vllm bench serve``: the options that ab passes, its requests, its result file.

``--mode`` selects a fault. The result has the keys of the real client's result;
``tests/engines/vllm/bench_client.py`` runs the real client.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import statistics
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(allow_abbrev=False)
for option in (
    "--backend", "--base-url", "--dataset-name", "--result-dir", "--result-filename", "--model",
    "--percentile-metrics", "--metric-percentiles", "--temperature",
):  # fmt: skip
    parser.add_argument(option)
for option in (
    "--random-input-len", "--random-output-len", "--num-prompts", "--max-concurrency", "--seed",
):  # fmt: skip
    parser.add_argument(option, type=int, required=True)
for option in ("--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed"):
    parser.add_argument(option, action="store_true")
parser.add_argument("--mode", default="well")
arguments = parser.parse_args()

Request = dict[str, Any]


def request(prompt: str) -> Request:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": arguments.random_output_len}
    began = last = time.perf_counter()
    times: list[float] = []
    text = ""
    url = f"{arguments.base_url}/v1/completions"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode()), timeout=30
        ) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                choices = json.loads(line[6:])["choices"]
                if choices:
                    text += choices[0]["text"]
                    now = time.perf_counter()
                    times.append(now - last)
                    last = now
    except (OSError, urllib.error.URLError) as error:
        return {"error": f"Traceback:\n{type(error).__name__}: {error}", "text": ""}
    return {"error": "", "text": text, "times": times, "latency": last - began}


if arguments.mode == "crash":
    sys.exit("ModuleNotFoundError: No module named 'vllm'")
if arguments.mode == "hang":
    time.sleep(600)
rng = random.Random(arguments.seed)
words = [f"w{rng.randrange(1000)}" for _ in range(arguments.random_input_len)]
prompts = [" ".join([f"{arguments.seed}-{i}", *words]) for i in range(arguments.num_prompts)]
start = time.perf_counter()
with concurrent.futures.ThreadPoolExecutor(arguments.max_concurrency) as pool:
    outputs = list(pool.map(request, prompts))
duration = time.perf_counter() - start
good = [o for o in outputs if not o["error"]]
given = sum(len(p.split()) for p in prompts)
made = sum(len(o["times"]) for o in good)
result: dict[str, Any] = {
    "num_prompts": arguments.num_prompts,
    "duration": duration,
    "completed": len(good),
    "failed": len(outputs) - len(good),
    "total_input_tokens": given + (arguments.mode == "other prompts" and time.time_ns() % 999),
    "total_output_tokens": made,
    "request_throughput": len(good) / duration,
    "output_throughput": made / duration,
    "total_token_throughput": (made + given) / duration,
    "generated_texts": [o["text"] for o in outputs],
    "errors": [o["error"] for o in outputs],
}
if good:
    values = {
        "ttft": [o["times"][0] for o in good],
        "tpot": [sum(o["times"][1:]) / max(1, len(o["times"]) - 1) for o in good],
        "itl": [t for o in good for t in o["times"][1:]] or [0.0],
    }
    for name, some in values.items():
        result[f"mean_{name}_ms"] = statistics.fmean(some) * 1000
        result[f"median_{name}_ms"] = statistics.median(some) * 1000
        result[f"p99_{name}_ms"] = sorted(some)[int(0.99 * (len(some) - 1))] * 1000
if arguments.mode == "old keys":
    del result["median_tpot_ms"]
if arguments.mode != "no file":
    file = Path(arguments.result_dir) / arguments.result_filename
    file.write_text("{" if arguments.mode == "half a file" else json.dumps(result))
