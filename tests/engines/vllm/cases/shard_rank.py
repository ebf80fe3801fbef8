"""One of two ranks with ``DSV4_SHARD_PREFILL=1``: a process of its own, started by case_shard.py.

vLLM's own code plans the chunks, runs the layers, and gathers over gloo by its own group. Each
scenario is run by this rank alone first, then by both together.

    shard_rank.py RANK FILE OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

FP32 = {"DSV4_PLUGIN": "1", "DSV4_BACKEND": "torch", "DSV4_TOPK": "fp32", "DSV4_LOGITS": "engine"}
BF16 = {**FP32, "DSV4_TOPK": "bf16", "DSV4_LOGITS": "plugin"}
OFF = {"DSV4_PLUGIN": "1", "DSV4_TOPK": "off"}
MIXED = [[("d", 900, 1), ("e", 40, 1), ("a", 1060, 40), ("b", 1450, 50), ("c", 0, 30)]]
# What a scheduler decides, step after step: (request, its tokens before, its new tokens).
STEPS: dict[str, list[list[tuple[str, int, int]]]] = {
    "mixed batch": MIXED,
    # In chunks, and each of them too large for one chunk of the indexer's logits.
    "chunked prompt": [[("a", at, 300)] for at in (0, 300, 600, 900)],
    "requests in many chunks of logits": [[("d", 900, 1), ("a", 1000, 200), ("w", 2000, 500)]],
    "prefix hits": [[("b", 0, 512)], [("p", 512, 90), ("q", 512, 60), ("b", 512, 7)]],
    # "a" is there in the first step and in no later one.
    "aborted request": [
        [("d", 900, 1), ("a", 0, 200), ("b", 600, 200)],
        [("d", 901, 1), ("b", 800, 200), ("c", 0, 64)],
        [("d", 902, 1), ("b", 1000, 1)],
    ],
    "short requests": [[("a", 0, 2), ("b", 0, 3)], [("a", 2, 3), ("b", 3, 4), ("c", 0, 6)]],
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"settings": BF16, "steps": steps} for name, steps in STEPS.items()},
    "many chunks, float32 of the engine": {
        "settings": FP32, "steps": STEPS["requests in many chunks of logits"],
    },
    "mixed batch, float32 of the engine": {"settings": FP32, "steps": MIXED},
    "mixed batch, the engine's top-k": {"settings": OFF, "steps": MIXED},
    "chunked prompt, keys of 4 tokens": {
        "settings": BF16, "steps": [[("w", at, 300)] for at in (0, 1000, 3800)], "ratio": 4,
    },
    "short requests, keys of 4 tokens": {
        "settings": BF16, "ratio": 4,
        "steps": [[("a", 0, 3), ("b", 0, 2)], *STEPS["short requests"]],
    },
    "nothing for rank 0": {"settings": BF16, "steps": STEPS["chunked prompt"], "empty": 0},
    "nothing for rank 1": {"settings": BF16, "steps": STEPS["chunked prompt"], "empty": 1},
    "the top-k of one fails": {
        "settings": FP32, "steps": STEPS["aborted request"], "fails": "topk",
    },
    "the logits of one fail": {
        "settings": BF16, "steps": STEPS["aborted request"], "fails": "logits",
    },
}  # fmt: skip
LAYERS = 2
KEYS = 1 << 13  # that a step can gather


def main(rank: int, meet: str, out: Path) -> None:
    import torch
    import torch.distributed as dist
    import vllm.envs
    from kits.ranks import compared, digest, only
    from kits.vllm_engine import Engine
    from kits.vllm_planner import World
    from vllm.distributed import parallel_state
    from vllm.v1.worker import workspace

    import dsv4_plugin
    from dsv4_plugin.engines.shared import logits, row_shard
    from dsv4_plugin.engines.vllm import register, unregister

    row_shard.FEWEST_KEYS, row_shard.KEYS_PER_INDEX = 1, 0
    vllm.envs.VLLM_SPARSE_INDEXER_MAX_LOGITS_MB = 1  # 256 Ki scores of four bytes a chunk
    whole, topk, paged, dense = row_shard.shard, dsv4_plugin.topk, logits.paged, logits.dense
    engine = Engine()
    with engine.config(None):
        parallel_state.init_distributed_environment(2, rank, f"file://{meet}", rank, "gloo")
        parallel_state.initialize_model_parallel(2)
    group = parallel_state.get_tp_group()
    gather = type(group).all_gather
    gathered: list[list[int]] = []

    def noted(self: Any, piece: torch.Tensor, dim: int = -1) -> torch.Tensor:
        gathered.append([*piece.shape])
        return gather(self, piece, dim)

    type(group).all_gather = noted

    def forget_keys() -> None:
        """Write over the workspace, where an earlier layer or step has gathered keys."""
        rest = ((KEYS * 136,), torch.uint8)
        workspace.current_workspace_manager().get_simultaneous(rest)[0].fill_(0x55)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this one fails")

    def run(case: dict[str, Any], together: bool) -> list[dict[str, Any]]:
        unregister()
        for old in [n for n in os.environ if n.startswith("DSV4_")]:
            del os.environ[old]
        os.environ.update(case["settings"], **({"DSV4_SHARD_PREFILL": "1"} if together else {}))
        register()
        world = World(engine, case.get("ratio", 1))
        for name in "abc":
            world.request(name, 1600)
        for name in "de":
            world.request(name, 1024)
        for name in "pq":
            world.request(name, 640, "b", 512)
        world.request("w", 4200)
        if "empty" in case:
            row_shard_of_vllm.shard = lambda *a, **k: only(whole(*a, **k), case["empty"])
        steps = []
        with engine.gpu(), engine.config("deepseek_v4", tensor_parallel_size=2):
            first = world.step([("a", 0, 2)], 0)
            layers = [engine.layer(first, max_total_seq_len=KEYS) for _ in range(LAYERS)]
            for number, scheduled in enumerate(case["steps"]):
                if together and rank == 1 and number == 0:
                    if case.get("fails") == "topk":
                        dsv4_plugin.topk = fail
                    if case.get("fails") == "logits":
                        logits.paged = logits.dense = fail
                gathered.clear()
                engine.calls.clear()
                found = []
                for seed, layer in enumerate(layers):
                    problem = world.step(scheduled, 10 * number + seed)
                    forget_keys()
                    found.append(engine.step(layer, problem))
                dsv4_plugin.topk, logits.paged, logits.dense = topk, paged, dense
                metadata = problem.metadata
                cut = metadata.prefill
                steps.append({
                    "found": found,
                    "gathered": [*gathered],
                    "scored": sum(c.rows for c in engine.calls if c.name == "dense_logits"),
                    "chunks": len(cut.chunks) if cut else 0,
                    "rows": len(found[0]),
                    "prefill": metadata.num_prefill_tokens,
                    "failures": sorted(dsv4_plugin.state.state.failures),
                })  # fmt: skip
        row_shard_of_vllm.shard = whole
        return steps

    from dsv4_plugin.engines.vllm import row_shard as row_shard_of_vllm

    report: dict[str, Any] = {}
    for name, case in CASES.items():
        alone, together = run(case, False), run(case, True)
        report[name] = [
            {
                **{key: value for key, value in both.items() if key != "found"},
                **compared(one["found"], both["found"]),
                "scored_alone": one["scored"],
                "gathered_alone": one["gathered"],
                "prefill_indices": [digest(x[len(x) - both["prefill"] :]) for x in both["found"]],
                "chunks_alone": one["chunks"],
            }
            for one, both in zip(alone, together, strict=True)
        ]
    out.write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": "lo"}
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
