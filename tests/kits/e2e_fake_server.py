"""Stands for a vLLM or SGLang server in the tests of the runner: the same answers, no model.

    python e2e_fake_server.py MODEL --port N [options of the engine]

FAKE_MS      milliseconds a token
FAKE_OTHER   a position at which the token differs from other servers'
FAKE_DIES    end at once, with this message
FAKE_FAILS   to copy contexts
FAKE_LATE    sends the first so many tokens of an answer at once
FAKE_CACHE   tokens the cache holds, as its log says
FAKE_SILENT  says nothing of the plugin, whatever is broken
FAKE_LOSES   breaks off an answer to a prompt of so many tokens
FAKE_HANGS   never answers a prompt of so many tokens
FAKE_HIGHER  so often its shadow saw a score of the engine's above our last
FAKE_FORGETS gives other answers after it has slept
FAKE_EMPTY   its traces have no kernel
FAKE_HITS    tokens that its prefix cache answered
FAKE_LAZY    the plugin serves in its first worker only
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FILL, LOGITS = ("FillFunctor<int>", 1.0), ("fp8_paged_mqa_logits", 4.0)
KERNELS = [("_compress_insert_indexer", 3.0), FILL, LOGITS]  # of a layer before its top-k
# The layers of make_tiny_v41.py: one of ratio 2, the source of the candidates, and a consumer.
V41_KEY = ("_indexer_k_norm_rope_quant_store_kernel", 3.0)
V41_KERNELS = [
    [V41_KEY, FILL, LOGITS],
    [V41_KEY, FILL, LOGITS, ("_block_scores_kernel", 5.0), ("at::native::mbtopk", 6.0),
     ("_store_candidates_kernel", 1.0)],
    [FILL, LOGITS, ("_candidate_flags_kernel", 2.0), ("_mask_candidates_kernel", 7.0)],
]  # fmt: skip


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def is_v41() -> bool:
    config = json.loads((Path(sys.argv[1]) / "config.json").read_text())
    return config["model_type"] == "deepseek_v41"


def trace(topk: float) -> dict[str, Any]:
    events, now = [], 0.0
    layers = V41_KERNELS if is_v41() else [KERNELS] * 3
    if "FAKE_EMPTY" in os.environ:
        layers = []
    for layer in layers * 9:
        for name, dur in [*layer, ("dsv4::topk_kernel", topk)]:
            events.append({"cat": "kernel", "name": name, "ts": now, "dur": dur, "args": {}})
            now += dur + 1
    return {"traceEvents": events}


class Server(ThreadingHTTPServer):
    request_queue_size = 64


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *args: object) -> None:
        pass

    def line(self, data: Any) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

    def do_GET(self) -> None:
        known = ("/health", "/is_sleeping", "/metrics")
        self.send_response(200 if self.path in known else 404)
        self.end_headers()
        if self.path == "/metrics":
            hits = os.environ.get("FAKE_HITS", "512.0")
            self.wfile.write(f'vllm:prefix_cache_hits_total{{engine="0"}} {hits}\n'.encode())
            return
        self.wfile.write(json.dumps({"is_sleeping": STATE["sleeping"]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null")
        if self.path == "/start_profile":  # vLLM has had the folder since its start
            STATE["traces"] = body.get("output_dir")
        if self.path == "/stop_profile":
            folder = Path(
                STATE["traces"] or json.loads(option("--profiler-config"))["torch_profiler_dir"]
            )
            (folder / f"rank0.{time.time_ns()}.pt.trace.json").write_text(json.dumps(trace(MS)))
        if self.path in SLEEPS + WAKES:
            STATE["sleeping"] = self.path in SLEEPS
            STATE["slept"] = True
        self.send_response(200)
        self.end_headers()
        native = self.path == "/generate"  # SGLang's
        if not native and self.path != "/v1/completions":
            return
        prompt = body["input_ids" if native else "prompt"]
        if native and "stream" not in body:
            cached = 0 if "FAKE_FORGETS" in os.environ else len(prompt) - 1
            self.wfile.write(json.dumps({"meta_info": {"cached_tokens": cached}}).encode())
            return
        asked = body["sampling_params"] if native else body
        if len(prompt) == int(os.environ.get("FAKE_HANGS", "0")):
            time.sleep(60)
        assert asked["temperature"] == 0 and asked["ignore_eos"] and body["stream"]
        assert native or body["model"] == option("--served-model-name")
        if "FAKE_FAILS" in os.environ:
            (Path(os.environ["E2E_DIR"]) / "copy").unlink(missing_ok=True)
        tokens: list[int] = []
        for i in range(asked["max_new_tokens" if native else "max_tokens"]):
            time.sleep(MS / 1000)
            if i and len(prompt) == int(os.environ.get("FAKE_LOSES", "0")):
                return
            other = i == OTHER or (STATE["slept"] and "FAKE_FORGETS" in os.environ)
            tokens.append((sum(prompt) + i + other) % 1000)
            if native:
                meta = {"completion_tokens": i + 1}
                self.line({"text": "x", "output_ids": tokens, "meta_info": meta})
                continue
            if i + 1 < LATE:
                continue
            choice: dict[str, Any] = {"text": "x"}
            if body.get("return_token_ids"):
                choice["token_ids"] = tokens[-1:]
            self.line({"choices": [choice], "usage": {"completion_tokens": i + 1}})
        if not native:
            self.line({"choices": [], "usage": {"completion_tokens": len(tokens)}})
        self.wfile.write(b"data: [DONE]\n\n")


def drilled() -> tuple[str, dict[str, int]]:
    """What the plugin says and counts in a server in which something is broken."""
    import dsv4_plugin

    all_of_it = {"topk.decode": 2, "topk.prefill": 2, "logits.plugin": 4, "gather": 1}
    upstream = {"topk.decode.upstream": 2, "topk.prefill.upstream": 2}
    if not IS_VLLM:
        all_of_it = {"topk.paged": 4, "logits.plugin": 2, "logits.bf16": 2}
        upstream = {"topk.paged.upstream": 4}
    off = "failed at a call and was switched off (RuntimeError: drill:"
    fault = os.environ.get("E2E_FAULT", "")
    if os.environ.get("DSV4_PLUGIN") == "0":
        return "DSV4_PLUGIN=0: nothing is patched in the engine", {}
    if Path(dsv4_plugin.__file__).is_relative_to(os.environ["E2E_DIR"]):
        return "dsv4 inactive in …: top-k: the engine's (bf16: /there/_C.so is not there)", upstream
    if fault == "capability":
        why = "the GPU has compute capability 7.5"
        return f"dsv4 inactive in …: top-k: the engine's ({why})", upstream
    if fault == "seam" and not IS_VLLM:
        where = "topk.paged (sglang.srt….topk_transform_paged takes (), not (scores, …))"
        return f"SGLang 0.5.23: the engine's own code stays at {where}", upstream
    if fault == "deep_gemm":
        why = "DeepGEMM's bf16 logits failed at a call (RuntimeError: drill: deep_gemm)"
        return f"{why}; …", {**all_of_it, "logits.bf16": 0}
    if fault == "seam":
        where = "topk.prefill (vllm._custom_ops.top_k_per_row_prefill takes …)"
        why = f"the engine's own code stays at {where}"
        return why, {**upstream, "gather": 1}
    if fault == "candidate_seam":
        why = "seam candidates was not found: _select_candidate_blocks takes (anything), not (…)"
        return f"dsv4 active in …, source layers: top-k: the engine's ({why})", all_of_it
    if fault in ("block_maxima", "select_blocks", "candidate_select"):
        return f"topk {off} {fault}); the engine serves", {**upstream, "gather": 1}
    if fault in ("topk", "logits"):
        return f"topk {off} {fault}); upstream serves", {**upstream, "gather": 1}
    if fault == "gather":
        return f"gather {off} gather); …", {**all_of_it, "gather": 0, "gather.upstream": 1}
    if is_v41():
        all_of_it |= {"candidates.source": 2, "candidates.consumer": 8}
    dtype = os.environ.get("DSV4_TOPK", "bf16")
    served = f"top-k: {dtype} by cuda on the plugin's {dtype} logits"
    return f"dsv4 active in vLLM 0.26.0, DeepSeek-V4 layers: {served}", all_of_it


def workers() -> list[int]:
    """The processes with the model: this one, and one more for each further GPU."""
    sizes = [
        sys.argv[i + 1] for i, a in enumerate(sys.argv) if a.endswith(("parallel-size", "tp-size"))
    ]
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    more = [subprocess.Popen(sleep).pid for _ in range(int(sizes[0] if sizes else 1) - 1)]
    return [os.getpid(), *more]


IS_VLLM = "--profiler-config" in sys.argv
SLEEPS = ("/sleep?level=1", "/sleep?level=2", "/release_memory_occupation")
WAKES = ("/wake_up", "/resume_memory_occupation")
STATE: dict[str, Any] = {"sleeping": False, "slept": False, "traces": None}
MS = float(os.environ.get("FAKE_MS", "1"))
OTHER = int(os.environ.get("FAKE_OTHER", "-1"))
LATE = int(os.environ.get("FAKE_LATE", "0"))

if __name__ == "__main__":
    if "FAKE_DIES" in os.environ:
        sys.exit(f"RuntimeError: {os.environ['FAKE_DIES']}")
    from importlib.metadata import entry_points

    group = "vllm.general_plugins" if IS_VLLM else "sglang.srt.plugins"
    found = [e.value for e in entry_points(group=group) if e.name == "dsv4_e2e"]
    print("INFO dsv4 stands in, beside", found, flush=True)
    if "FAKE_CACHE" in os.environ:
        print(f"INFO GPU KV cache size: {int(os.environ['FAKE_CACHE']):,} tokens", flush=True)
    print("INFO dsv4: plugins allowed:", os.environ.get("VLLM_PLUGINS"), flush=True)
    line, counters = drilled()
    if "FAKE_SILENT" not in os.environ:
        there = "(EngineCore pid=1) INFO 11-25 23:34:28 [dsv4]"
        print(f"{there if IS_VLLM else '[2026-11-25 23:34:28]'} {line}", flush=True)
    print("INFO Graph capturing finished in 3 secs, took 1.25 GiB", flush=True)
    folder = Path(os.environ["E2E_DIR"])
    seen = {"rows": 9, "higher": int(os.environ.get("FAKE_HIGHER", "0"))}
    shadow = (
        {kind: seen for kind in ("decode", "prefill", "paged")}
        if "DSV4_SHADOW" in os.environ
        else None
    )
    statuses = Path(os.environ["DSV4_STATUS_DIR"])
    statuses.mkdir()
    for rank, pid in enumerate(workers()):
        memory = folder / f"memory-{pid}.json"
        memory.write_text(json.dumps({"allocated_gib": 9.0, "reserved_gib": 10.5}))
        (folder / f"rows-{pid}.json").write_text(json.dumps({f"prefill of rank {rank}": 5}))
        idle = rank and "FAKE_LAZY" in os.environ
        about = {"pid": pid, "node": platform.node(), "engine": "fake", "shadow": shadow}
        report = {**about, "counters": {} if idle else counters, "failures": {}}
        (statuses / f"{pid}.json").write_text(json.dumps(report))
    Server(("127.0.0.1", int(option("--port"))), Handler).serve_forever()
