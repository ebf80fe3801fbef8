"""Does SGLang choose the same candidate blocks and keys in every run?

    python benchmarks/probes/sglang_publish_decode.py --site FOLDER [--more FOLDER] --json FILE

It calls ``DenseBlocksBackend.publish_decode`` of an unpacked SGLang (0.5.22 or later) many times on
the same tensors, on a GPU of compute capability 9.0, without the plugin. It compares the blocks and
keys of each run, as sets, with those of the first. From 262,144 positions on SGLang selects with
its cluster kernel. According to its source this kernel takes equal scores in the order of arrival
and may drop members of a full bin. ``blocks_missed`` and ``keys_missed`` count members that are
better than the worst one that was taken. The head weights have both signs (``signed``), are all
positive, or are positive on keys that are nearly equal (``close``), where more scores fall into one
bin.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEYS = (65_536, 262_144, 524_288, 1 << 20)
WEIGHTS = ("signed", "positive", "close")


def main() -> None:
    """Run every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, nargs="+", default=[])
    parser.add_argument("--more", type=Path, nargs="+", default=[])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 6])
    arguments = parser.parse_args()
    sys.path[:0] = [*map(str, arguments.site), str(ROOT), str(ROOT / "tests")]
    sys.path += [str(path) for path in arguments.more]

    import torch
    from kits.sglang_v41 import SOURCE, Model, start

    from dsv4_plugin.cli.checks.timing import machine

    v41 = start("cuda")
    model = Model(v41, KEYS[-1], 1)
    found: dict[str, Any] = {
        "machine": machine(), "what": "publish_decode repeated", "runs": arguments.runs,
        "version": f"SGLang {v41.engine.version}", "results": [],
    }  # fmt: skip
    for weights in WEIGHTS:
        if weights == "close":  # one value and one scale: scores differ by the last bits of sums
            for cache in model.caches.values():
                cache[:, : 64 * 64] = cache[:, : 64 * 64] & 0x11 | 0x22
                cache[:, 64 * 64 :] = 127
        for rows in arguments.rows:
            for keys in KEYS:
                mode = "verify" if rows > 1 else "decode"
                forward = model.forward(model.batch((keys,), rows, mode))
                forward.prepare()
                if weights != "signed":
                    q, w = forward.made[SOURCE]
                    forward.made[SOURCE] = q, w.abs()
                row = _repeat(torch, forward, SOURCE, arguments.runs)
                row |= {"weights": weights, "rows": rows, "keys": keys}
                found["results"].append(row)
                print(row, flush=True)
                arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def _repeat(torch: Any, forward: Any, layer: int, runs: int) -> dict[str, Any]:
    """Compare the runs' sets of blocks and keys with the first run's."""
    first: tuple[Any, Any] | None = None
    differ = {"blocks": 0, "keys": 0}
    most = {"blocks": 0, "keys": 0}
    missed = {"blocks": 0, "keys": 0}
    scan = forward.v41.scoring.fp4_index_logits_paged
    seen: list[Any] = []

    def spy(*args: Any) -> Any:
        seen[:] = [scan(*args)]
        return seen[0]

    forward.v41.scoring.fp4_index_logits_paged = spy
    try:
        for _ in range(runs):
            slots = forward.run(layer).sort(1).values
            blocks = forward.metadata.candidate_metadata.blocks.clone().sort(1).values
            if first is None:
                first = blocks, slots
            for name, got, want in zip(differ, (blocks, slots), first, strict=True):
                if not torch.equal(got, want):
                    differ[name] += 1
                    most[name] = max(most[name], _apart(torch, got, want))
            for row, n in enumerate((forward.batch.positions + 1).tolist()):
                scores = seen[0][row, :n]
                whole = torch.nn.functional.pad(scores, (0, -n % 8), value=-torch.inf)
                best = whole.view(-1, 8).amax(1)
                best[-1] = torch.inf  # the newest block is always taken
                missed["blocks"] += _missed(torch, best, blocks[row])
                keys = forward.positions_of(layer, slots[row][slots[row] >= 0])
                missed["keys"] += _missed(torch, scores, keys)
    finally:
        forward.v41.scoring.fp4_index_logits_paged = scan
    return {
        **{f"{name}_differ": count for name, count in differ.items()},
        **{f"{name}_most_apart": count for name, count in most.items()},
        **{f"{name}_missed": count for name, count in missed.items()},
    }


def _apart(torch: Any, got: Any, want: Any) -> int:
    """Return how many members of a row's set are missing in the other set, in the worst row."""
    rows = zip(got, want, strict=True)
    return max(int((~torch.isin(a, b)).sum()) for a, b in rows)


def _missed(torch: Any, scores: Any, chosen: Any) -> int:
    """Return how many members were left out although they are better than the worst one taken."""
    chosen = chosen[chosen >= 0].long()
    taken = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    taken[chosen[chosen < len(scores)]] = True
    worst = scores[taken].min()
    return int(((scores > worst) & ~taken).sum())


if __name__ == "__main__":
    main()
