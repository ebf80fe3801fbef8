"""Shared by the GPU tests of the top-k: the device, guarded buffers, draws of rows.

They are made for a GPU. Without a GPU a test uses the torch reference, so that the tests themselves
can be tried.
"""

from __future__ import annotations

import functools

import torch
from kits import canary
from kits.oracles import bits  # noqa: F401

from dsv4_plugin import topk
from dsv4_plugin.cli.checks.inputs import scores
from dsv4_plugin.cli.checks.topk_cases import DTYPES

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKEND = "cuda" if ON_GPU else "torch"

Guarded = functools.partial(canary.Guarded, device=DEVICE)


def run(logits, lengths, k, **more):
    """Call the implementation under test.

    Without `out` every tensor of the call lies between canaries, which are checked afterwards;
    a caller that passes an `out` (for a graph, a stream, its own guards) gets the plain call.
    """
    more["backend"] = BACKEND
    if more.get("out") is not None:
        return topk(logits, lengths, k, **more)
    canaries = canary.Canaries()
    for name in ("row_starts", "page_table"):
        if more.get(name) is not None:
            more[name] = canaries.around(name, more[name])
    out = canaries.output("out", len(logits), k, torch.int32, DEVICE)
    logits, lengths = canaries.around("logits", logits), canaries.around("lengths", lengths)
    topk(logits, lengths, k, out=out, **more)
    canaries.check(f"{tuple(logits.shape)}, k {k}")
    return out.clone()


def draw(kind, rows, columns, dtype, seed=0):
    return scores(kind, rows, columns, DTYPES[dtype], seed=seed, device=DEVICE)


def ints(values, dtype=torch.int32):
    return torch.tensor(list(values), dtype=dtype, device=DEVICE)


def check_on_two_streams(both, lengths, k, times):
    """Select in two tensors on two streams at once: there is no state that calls share."""
    want = [run(x, lengths, k) for x in both]
    streams = [torch.cuda.Stream() for _ in both]
    outs = [[torch.empty_like(want[0]) for _ in range(times)] for _ in both]
    torch.cuda.synchronize()
    for i in range(times):
        for stream, x, out in zip(streams, both, outs, strict=True):
            with torch.cuda.stream(stream):
                run(x, lengths, k, out=out[i])
    torch.cuda.synchronize()
    for w, some in zip(want, outs, strict=True):
        assert torch.equal(torch.stack(some), w.expand(times, *w.shape))
