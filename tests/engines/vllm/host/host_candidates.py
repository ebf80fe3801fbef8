"""DeepSeek-V4.1: a plain layer, the source of the candidate blocks, and a layer that uses them.

The scores are sums of small integers, so every implementation has the same bits and many scores
tie. The oracle is a stable sort over them.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from kits.host_parts import oracle, read_keys, score

import dsv4_plugin

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm.models.deepseek_v41") is None, reason="a release before V4.1"
)

BLOCKS = 128  # candidates of a row; a row of up to 1,024 keys has all of its blocks
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCHES = {
    "decode": {"decode": (3000, 700, 300, 5001, 9)},
    "decode, whole and partial newest blocks": {"decode": (2048, 2049, 2055, 1024, 1025, 1)},
    "two rows a request": {"decode": (2000, 3333), "next_n": 2},
    "four rows a request, one at the edge of k": {"decode": (2000, 3333, 513), "next_n": 4},
    "an empty row": {"decode": (2100, 0, 1700)},
    "prefill": {"prefill": ((2500, 40), (900, 17))},
    "mixed": {"decode": (4000, 1234), "prefill": ((3001, 33), (40, 5))},
    "pages of 32 keys": {"decode": (2600, 1999), "page_size": 32},
    "padded pages": {"decode": (2600, 1999), "prefill": ((1500, 9),), "page_padding": 192},
}
batches = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


class Model:
    """Three layers over one cache and one buffer of candidates, and their oracle."""

    def __init__(self, engine, batch, *, piece=8, blocks=BLOCKS):
        sizes = {"heads": 32, "max_model_len": 6144, "quantum": 0.5, "seed": 3, **batch}
        self.engine, self.piece, self.blocks = engine, piece, blocks
        self.problem = engine.problem(**sizes)
        self.other = engine.problem(**sizes)  # the same keys; the consumer's queries are its own
        g = torch.Generator().manual_seed(4)
        query = torch.randint(0, 2, self.other.query.shape, generator=g)
        self.other.query = query.float().to(torch.float8_e4m3fn)
        rows = len(self.problem.buffer)
        self.candidates = torch.full((rows, blocks), -7, dtype=torch.int32)

    def build(self, *, gpu=90, config=None, candidates=True, **parallel):
        """The three layers, as vLLM builds them for this model."""
        given = {"candidate_block_size": self.piece}
        with self.engine.gpu(gpu), self.engine.config("deepseek_v41", config, **parallel):
            return (
                self.engine.layer(self.problem),
                self.engine.layer(
                    self.problem, candidate_blocks=self.candidates, candidate_write=True, **given
                ),
                self.engine.layer(self.other, candidate_blocks=self.candidates, **given),
            )

    def step(self, layers, *, gpu=90):
        """Run them in turn; returns the indices of each."""
        self.engine.calls.clear()
        self.candidates.fill_(-7)
        with self.engine.gpu(gpu), self.engine.config("deepseek_v41"):
            return [
                self.engine.step(layer, problem)
                for layer, problem in zip(
                    layers, (self.problem, self.problem, self.other), strict=True
                )
            ]

    def __call__(self, **how):
        return self.step(self.build(**how))

    def scores(self, problem):
        """The float32 scores of every row, decode rows first."""
        decode, found, row = problem.metadata.decode, [], 0
        requests = []
        if decode is not None:
            next_n = problem.metadata.num_decode_tokens // decode.block_table.shape[0]
            for pages in decode.block_table:
                requests.append((lambda n, pages=pages: read_keys(problem.cache, pages, n), next_n))
        prefill = problem.metadata.prefill
        if prefill is not None:
            owner = prefill.chunks[0].cu_seqlen_ks.unique_consecutive(return_counts=True)[1]
            for keys, count in zip(problem.keys, owner.tolist(), strict=True):
                requests.append((lambda n, keys=keys: keys[:n], count))
        for keys_of, count in requests:
            for _ in range(count):
                n = max(0, problem.lengths[row])
                keys = keys_of(n)
                found.append(
                    score(problem.query[row], keys, problem.weights[row]) if n else torch.empty(0)
                )
                row += 1
        return found

    def expected(self, dtype):
        """Indices of the three layers and the candidates, by stable sorts."""
        plain, blocks, chosen = [], [], []
        for mine, theirs in zip(self.scores(self.problem), self.scores(self.other), strict=True):
            mine, theirs = mine.to(dtype), theirs.to(dtype)
            plain.append(oracle(mine, self.problem.k))
            padded = torch.nn.functional.pad(
                mine.float(), (0, -len(mine) % self.piece), value=-torch.inf
            )
            best = padded.view(-1, self.piece).amax(dim=1)
            if len(best):
                best[-1] = torch.inf
            blocks.append(oracle(best, self.blocks))
            kept = blocks[-1][blocks[-1] >= 0].long()
            keys = (kept[:, None] * self.piece + torch.arange(self.piece)).flatten()
            keys = keys[keys < len(theirs)]
            columns = oracle(theirs[keys], self.problem.k)
            row = torch.full_like(columns, -1)
            row[columns >= 0] = keys[columns[columns >= 0].long()].int()
            chosen.append(row)
        plain, blocks, chosen = map(torch.stack, (plain, blocks, chosen))
        return [plain, plain, chosen], blocks


def names(engine):
    return [call.name for call in engine.calls]


def counters():
    return dsv4_plugin.status()["counters"]


@pytest.fixture
def on(monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")


@batches
def test_not_asked_for_the_engine_serves_all_three(engine, batch):
    model = Model(engine, batch)
    got = model()
    want, _ = model.expected(torch.float32)
    for kind in (0, 1):  # ties have no order, so only their scores can be compared
        check_scores(model.scores(model.problem), got[kind], want[kind])
    assert {"select_candidate_blocks", "apply_candidate_mask"} <= set(names(engine))
    assert counters() == {}


def check_scores(scores, got, want):
    for row, a, b in zip(scores, got, want, strict=True):
        a, b = (row[x[x >= 0].long()].sort().values for x in (a, b))
        assert torch.equal(a, b)


@batches
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_in_every_layer(engine, on, monkeypatch, batch, dtype):
    """Indices and candidates as ordered lists: ascending, the lowest position among ties."""
    monkeypatch.setenv("DSV4_TOPK", dtype)
    monkeypatch.setenv("DSV4_STRICT", "1")
    model = Model(engine, batch)
    got = model()
    want, blocks = model.expected(DTYPES[dtype])
    for kind, a, b in zip(("plain", "source", "consumer"), got, want, strict=True):
        assert torch.equal(a, b), kind
    assert torch.equal(model.candidates[: len(blocks)], blocks)
    assert bool((model.candidates[len(blocks) :] == -7).all()), "rows of another batch"


@batches
def test_a_consumer_scores_no_more_than_its_candidates(engine, on, batch):
    model = Model(engine, batch)
    model()
    assert not {"select_candidate_blocks", "apply_candidate_mask"} & set(names(engine))
    # The plain layer alone writes logits of the whole context, once at decode, once at prefill.
    parts = bool(batch.get("decode")) + bool(batch.get("prefill"))
    dense = [call for call in engine.calls if call.logits is not None]
    assert len(dense) == parts
    found = counters()
    assert found["candidates.source"] == found["candidates.consumer"] == parts
    assert not [name for name in found if name.endswith((".upstream", ".engine"))]
