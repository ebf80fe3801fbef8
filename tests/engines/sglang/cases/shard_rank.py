"""One of two ranks with ``DSV4_SHARD_PREFILL=1``: a process of its own, started by case_shard.py.

SGLang's own indexer runs, hooked by its own registry, and its own group gathers over gloo. Each
scenario is run by this rank alone first, then by both together.

    shard_rank.py RANK FILE OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

AUTO = {"DSV4_PLUGIN": "1", "DSV4_BACKEND": "torch"}
FP32 = {**AUTO, "DSV4_TOPK": "fp32", "DSV4_LOGITS": "plugin"}
# What a scheduler decides, step after step: its mode, and of each request the tokens before and
# the new ones. Requests of a step have the same first pages, as after prefix hits.
MIXED = [("MIXED", [(3000, 1), (160, 1), (3100, 20), (2000, 25), (0, 30)])]
CHUNKED = [("EXTEND", [(at, 50)]) for at in (0, 3000)]
CASES: dict[str, dict[str, Any]] = {
    "mixed batch": {"steps": MIXED},
    "mixed batch in float32": {"steps": MIXED, "settings": FP32},
    "mixed batch with raw indices": {"steps": MIXED, "raw": True},
    "mixed batch, top-k of the first form": {"steps": MIXED, "v2": False, "raw": True},
    "chunked prompt": {"steps": CHUNKED},
    "chunked prompt, DeepGEMM's bfloat16": {"steps": CHUNKED, "deep_gemm": True},
    "nothing for rank 0, DeepGEMM's bfloat16": {"steps": CHUNKED, "deep_gemm": True, "empty": 0},
    "prefills and decodes": {
        "steps": [
            ("EXTEND", [(900, 60), (30, 40)]), ("DECODE", [(960, 1), (70, 1)]),
            ("EXTEND", [(0, 2), (0, 3)]), ("EXTEND", [(960, 50)]), ("TARGET_VERIFY", [(960, 2)]),
        ],
    },
    "ranks cut by free memory": {"steps": [*MIXED, *CHUNKED], "budget": True},
    "nothing for rank 0": {"steps": [*MIXED, *CHUNKED], "empty": 0},
    "nothing for rank 1": {"steps": [*MIXED, *CHUNKED], "empty": 1},
    "the top-k of one fails": {"steps": [*MIXED, *CHUNKED], "settings": FP32, "fails": "topk"},
    "the top-k of one fails, first form": {
        "steps": MIXED, "settings": FP32, "v2": False, "raw": True, "fails": "topk",
    },
    "the logits of one fail": {
        "steps": [*MIXED, *CHUNKED], "settings": FP32, "fails": "logits", "budget": True,
    },
}  # fmt: skip
LAYERS = 2


def main(rank: int, meet: str, out: Path) -> None:
    import conftest
    import torch
    import torch.distributed as dist
    from kits.ranks import compared, digest, only
    from kits.sglang_engine import Engine, Layer, prepare

    prepare()
    import sglang.srt.plugins as plugins

    import dsv4_plugin
    from dsv4_plugin.engines.sglang import policy, registry, unregister
    from dsv4_plugin.engines.sglang import row_shard as of_sglang
    from dsv4_plugin.engines.shared import adapter, logits, row_shard

    engine = Engine()
    pristine = conftest.places(engine)
    parallel_state = of_sglang._parallel_state()
    start_ranks(parallel_state, rank, meet)
    of_sglang._options = lambda: {"tp_size": 2, "pp_size": 1}
    row_shard.FEWEST_KEYS, row_shard.KEYS_PER_INDEX = 1, 0
    whole, topk, paged, dense = row_shard.shard, dsv4_plugin.topk, logits.paged, logits.dense
    group = type(parallel_state.get_tp_group())
    gather, gathered = group.all_gather, []

    def noted(self: Any, piece: torch.Tensor, dim: int = -1, **more: Any) -> torch.Tensor:
        gathered.append([*piece.shape])
        return gather(self, piece, dim, **more)

    group.all_gather = noted

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this one fails")

    def load(settings: dict[str, str]) -> None:
        unregister()
        registry._hooks.clear()
        plugins.hook_registry.HookRegistry.reset()
        for (owner, name), value in pristine.items():
            setattr(owner, name, staticmethod(value) if name == "add_cli_args" else value)
        for old in [n for n in os.environ if n.startswith("DSV4_")]:
            del os.environ[old]
        os.environ.update(settings)
        plugins._plugins_loaded = False
        plugins.load_plugins()

    def batch(case: dict[str, Any], mode: str, requests: list[tuple[int, int]], seed: int) -> Any:
        keys = tuple((n + row + 1) // 4 for n, new in requests for row in range(new))
        problem = engine.problem(keys, raw=case.get("raw", False), prefill=True, seed=seed)
        other = torch.randperm(len(problem.cache), generator=torch.Generator().manual_seed(rank))
        problem.cache = problem.cache[other.argsort()]  # a rank's pool has its own order
        problem.table = other[problem.table.long()].to(torch.int32)
        problem.prefill = mode == "EXTEND" and len(requests) == 1
        layer = Layer(engine, problem, None)
        layer._last = (requests[-1][0] + requests[-1][1]) // 4
        metadata = layer.backend.forward_metadata.indexer_metadata
        if case.get("budget") and hasattr(metadata, "rows_per_chunk"):
            rows = 7 + 6 * rank
            metadata.mqa_logits_budget_bytes = rows * 4 * 1024
            parts = -(-len(keys) // rows)
            if not problem.prefill:
                metadata.rows_per_chunk = rows
                metadata.deep_gemm_metadata = [metadata.deep_gemm_metadata] * parts
                metadata.topk_metadata_chunks = [metadata.topk_metadata] * parts
        tokens = [n + new for n, new in requests]
        more = {
            "forward_mode": getattr(engine.mode, mode), "batch_size": len(requests),
            "seq_lens": torch.tensor(tokens), "seq_lens_cpu": torch.tensor(tokens),
            "extend_seq_lens": torch.tensor([new for _, new in requests]),
            "extend_seq_lens_cpu": [new for _, new in requests],
            "extend_start_loc": torch.zeros(len(requests), dtype=torch.int64),
        }  # fmt: skip
        if problem.prefill:
            more["extend_num_tokens"] = len(keys)
        return problem, layer, more

    def run(case: dict[str, Any], together: bool) -> list[dict[str, Any]]:
        settings = case.get("settings", AUTO)
        # It is chosen for the CUDA kernel only.
        policy._prefill_by_deep_gemm = lambda *_: case.get("deep_gemm", False)
        load({**settings, **({"DSV4_SHARD_PREFILL": "1"} if together else {})})
        engine.envs.SGLANG_OPT_USE_TOPK_V2.set(case.get("v2", True))
        of_sglang._cut.cache_clear()
        if "empty" in case:
            row_shard.shard = lambda *a, **k: only(whole(*a, **k), case["empty"])
        steps = []
        for number, (mode, requests) in enumerate(case["steps"]):
            gathered.clear()
            engine.calls.clear()
            found, positions = [], []
            for seed in range(LAYERS):
                problem, layer, more = batch(case, mode, requests, 10 * number + seed)
                if together and rank == 1 and number == 0 and seed == 1:
                    if case.get("fails") == "topk":
                        dsv4_plugin.topk = fail
                    if case.get("fails") == "logits":
                        logits.paged = logits.dense = fail
                layer.run(**more)
                dsv4_plugin.topk, logits.paged, logits.dense = topk, paged, dense
                found += [problem.out.clone()]
                found += [] if problem.raw is None else [problem.raw.clone()]
                positions.append(of_sglang.positions_of(problem.out, problem.table, 64))
            scored = [c for c in engine.calls if c.name in ("dense_logits", "paged_logits")]
            steps.append({
                "found": found,
                "positions": positions,
                "gathered": [*gathered],
                "scored": sum(c.rows for c in scored),
                "parts": len(scored),
                "off": sorted(adapter.current().off),
                "bf16": dsv4_plugin.status()["counters"].get("logits.bf16", 0),
            })  # fmt: skip
        row_shard.shard = whole
        return steps

    report: dict[str, Any] = {}
    for name, case in CASES.items():
        alone, together = run(case, False), run(case, True)
        report[name] = [
            {
                **{name: both[name] for name in ("gathered", "scored", "parts", "off", "bf16")},
                **compared(one["found"], both["found"]),
                "gathered_alone": one["gathered"],
                "positions": [*map(digest, both["positions"])],
            }
            for one, both in zip(alone, together, strict=True)
        ]
    out.write_text(json.dumps(report))
    dist.destroy_process_group()


def start_ranks(parallel_state: Any, rank: int, meet: str) -> None:
    """Make SGLang's groups of two ranks."""
    import inspect

    parallel_state.init_distributed_environment(
        world_size=2, rank=rank, local_rank=rank, backend="gloo",
        distributed_init_method=f"file://{meet}",
    )  # fmt: skip
    if (
        "tensor_model_parallel_size"
        in inspect.signature(parallel_state.initialize_model_parallel).parameters
    ):
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, backend="gloo")
        return
    from sglang.srt import runtime_context

    widths: dict[str, Any] = dict.fromkeys(("tp_size", "attn_tp_size", "moe_tp_size"), 2)
    for name in ("pp", "moe_ep", "moe_dp", "attn_dp", "attn_cp", "attn_dcp"):
        widths[f"{name}_size"] = 1
    widths["shared_experts_tp_size"] = None
    known = runtime_context._parallel_fields()
    widths = {name: size for name, size in widths.items() if name in known}
    with runtime_context.get_parallel().override(**widths):
        parallel_state.initialize_model_parallel(backend="gloo")


if __name__ == "__main__":
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false"}
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
