"""One of two ranks that share a prefill's rows: a separate process that case_ranks.py starts.

vLLM's own code decides the rows, narrows every chunk and copies what it gathers. Its groups are
over gloo. vLLM gathers pieces of several lengths only on GPUs, so this program gathers them as vLLM
does with NCCL, by a broadcast from each rank.

    two_ranks.py RANK FILE OUT
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

PLUGIN = {"DSV4_PLUGIN": "1", "DSV4_BACKEND": "torch"}
FP32 = {**PLUGIN, "DSV4_TOPK": "fp32", "DSV4_LOGITS": "engine"}
BF16 = {**PLUGIN, "DSV4_TOPK": "bf16", "DSV4_LOGITS": "plugin"}
FAILS = {**FP32, "fails": "at the first shared prefill"}
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "float32 scores of the engine": (FP32, FP32),
    "bfloat16 scores of the plugin": (BF16, BF16),
    "one without the plugin": (FP32, {}),
    "one that switches it off": (FP32, FAILS),
}
DECODE = (1200, 60)
PREFILL = ((1100, 40), (1500, 50), (30, 30))  # tokens of context, and of them new ones
SPLIT = 55  # rows of the first chunk
FEWEST = 16  # rows that are worth sharing


def in_two_chunks(prefill: Any) -> Any:
    """Divide the one chunk of a problem; the requests keep their places among the keys."""
    (chunk,) = prefill.chunks
    cut = chunk.token_start + SPLIT
    parts = []
    for begin, end in ((chunk.token_start, cut), (cut, chunk.token_end)):
        rows = slice(begin - chunk.token_start, end - chunk.token_start)
        parts.append(dataclasses.replace(
            chunk, token_start=begin, token_end=end, cu_seqlen_ks=chunk.cu_seqlen_ks[rows],
            cu_seqlen_ke=chunk.cu_seqlen_ke[rows],
        ))  # fmt: skip
    return dataclasses.replace(prefill, chunks=parts)


def main(rank: int, meet: str, out: Path) -> None:
    import torch
    import torch.distributed as dist
    from kits.ranks import digest
    from kits.vllm_engine import Engine
    from vllm.distributed import parallel_state
    from vllm.v1.attention.backends.mla.indexer import balanced_prefill_row_shard

    import dsv4_plugin
    from dsv4_plugin.engines.vllm import register, unregister
    from dsv4_plugin.state import State

    class Gathers:
        def all_gatherv(
            self, given: torch.Tensor, dim: int = 0, sizes: list[int] | None = None
        ) -> torch.Tensor:
            assert dim == 0 and sizes is not None and given.shape[0] == sizes[rank]
            gathered.append([*given.shape])
            pieces = [given.new_empty(n, *given.shape[1:]) for n in sizes]
            pieces[rank] = given
            for root, piece in enumerate(pieces):
                dist.broadcast(piece, root)
            return torch.cat(pieces)

    def counted(self: State, name: str, rows: int = 1) -> None:
        served[name] = served.get(name, 0) + rows
        count(self, name, rows)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this rank's top-k fails")

    count, topk = State.count, dsv4_plugin.topk
    State.count = counted  # type: ignore[method-assign]
    contexts, new = torch.tensor(PREFILL).T
    sizes = balanced_prefill_row_shard(contexts, new, 1, 2, FEWEST)
    engine, found = Engine(), {}
    with engine.config(None):
        parallel_state.init_distributed_environment(2, rank, f"file://{meet}", rank, "gloo")
        parallel_state.initialize_model_parallel(2)
    assert parallel_state.get_tensor_model_parallel_rank() == rank
    parallel_state.get_tp_group().device_communicator = Gathers()
    for name, settings in CASES.items():
        given = dict(settings[rank])
        fails = given.pop("fails", None)
        unregister()
        for old in [n for n in os.environ if n.startswith("DSV4_")]:
            del os.environ[old]
        os.environ |= given
        register()
        problem = engine.problem(DECODE, PREFILL, heads=4, seed=5)
        prefill = problem.metadata.prefill = in_two_chunks(problem.metadata.prefill)
        gathered: list[list[int]] = []
        served: dict[str, int] = {}
        with engine.gpu(), engine.config("deepseek_v4", tensor_parallel_size=2):
            layer = engine.layer(problem)
            alone = engine.step(layer, problem)
            served.clear()
            engine.calls.clear()
            prefill.row_shard_sizes = sizes
            if fails:
                dsv4_plugin.topk = fail
            together = engine.step(layer, problem)
            dsv4_plugin.topk = topk
        found[name] = {
            "sizes": sizes,
            "gathered": gathered,
            "scored": sum(c.rows for c in engine.calls if c.name == "dense_logits"),
            "served": served,
            "same_as_alone": torch.equal(alone.sort(1).values, together.sort(1).values),
            "indices": digest(together[len(DECODE) :]),
        }
    out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": "lo"}
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
