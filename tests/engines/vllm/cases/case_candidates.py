"""DeepSeek-V4.1: a plain layer, the source of the candidate blocks, and a layer that uses them.

The scores are sums of small integers, so every implementation has the same bits and many scores
tie. The oracle is a stable sort over them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import types

import pytest
import torch
from conftest import another_reader, canonical
from kits.engine_parts import oracle, read_keys, score

import dsv4_plugin
from dsv4_plugin.engines.shared import adapter

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
        self.other.cache, self.other.buffer = self.problem.cache, self.problem.buffer
        rows = len(self.problem.buffer)
        self.candidates = torch.full((rows, blocks), -7, dtype=torch.int32)

    def build(self, *, gpu=90, config=None, consumer_piece=None, **parallel):
        """The three layers, as vLLM builds them for this model."""
        given = {"candidate_block_size": self.piece}
        consumer = {"candidate_block_size": consumer_piece or self.piece}
        with self.engine.gpu(gpu), self.engine.config("deepseek_v41", config, **parallel):
            return (
                self.engine.layer(self.problem),
                self.engine.layer(
                    self.problem, candidate_blocks=self.candidates, candidate_write=True, **given
                ),
                self.engine.layer(self.other, candidate_blocks=self.candidates, **consumer),
            )

    @property
    def problems(self):
        """What each layer gets."""
        return self.problem, self.problem, self.other

    @contextlib.contextmanager
    def pass_of(self, gpu=90):
        """One forward pass; yields vLLM's context of it."""
        with (
            self.engine.gpu(gpu),
            self.engine.config("deepseek_v41"),
            self.engine.forward(self.problem),
        ):
            yield importlib.import_module("vllm.forward_context").get_forward_context()

    def step(self, layers, *, gpu=90):
        """Run them in turn; returns the indices of each."""
        self.engine.calls.clear()
        self.candidates.fill_(-7)
        found = []
        with self.pass_of(gpu):
            for layer, problem in zip(layers, self.problems, strict=True):
                problem.buffer.fill_(7)
                layer(problem.hidden, problem.query, None, problem.weights)
                found.append(problem.buffer[: len(problem.lengths), : problem.k].clone())
        return found

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
            begins = torch.cat([chunk.cu_seqlen_ks for chunk in prefill.chunks])
            owner = begins.unique_consecutive(return_counts=True)[1]
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
        for mine, other in zip(self.scores(self.problem), self.scores(self.other), strict=True):
            mine, other = mine.to(dtype), other.to(dtype)
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
            keys = keys[keys < len(other)]
            columns = oracle(other[keys], self.problem.k)
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


@pytest.fixture
def sparse(monkeypatch):
    """Prefill chunks of consumers are scored by candidates, however narrow they are."""
    from dsv4_plugin.engines.vllm import candidates

    monkeypatch.setattr(candidates, "WHOLE_COLUMNS", 0)


@batches
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_by_candidates_alone(engine, on, sparse, monkeypatch, batch, dtype):
    """As above; the source too selects among its candidates, as if its logits were too large."""
    from dsv4_plugin.engines.vllm import candidates

    monkeypatch.setattr(candidates, "KEPT_BYTES", 0)
    monkeypatch.setenv("DSV4_TOPK", dtype)
    monkeypatch.setenv("DSV4_STRICT", "1")
    model = Model(engine, batch, blocks=513)  # one more than the lemma asks for 512 keys
    got = model()
    want, blocks = model.expected(DTYPES[dtype])
    for kind, a, b in zip(("plain", "source", "consumer"), got, want, strict=True):
        assert torch.equal(a, b), kind
    assert torch.equal(model.candidates[: len(blocks)], blocks)


@batches
def test_a_consumer_scores_no_more_than_its_candidates(engine, on, sparse, batch):
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


@pytest.mark.parametrize("blocks", [64, 512])
def test_a_source_with_few_candidates_scores_every_key(engine, on, monkeypatch, blocks):
    """Of 512 keys one may lie outside of 512 blocks, since the newest block always has a place."""
    from dsv4_plugin.engines.vllm import candidates

    monkeypatch.setattr(candidates, "KEPT_BYTES", 0)
    monkeypatch.setenv("DSV4_STRICT", "1")
    model = Model(engine, BATCHES["two rows a request"], blocks=blocks)
    got = model()
    want, found = model.expected(torch.bfloat16)
    assert all(map(torch.equal, got, want))
    assert torch.equal(model.candidates[: len(found)], found)


# --- what is computed -----------------------------------------------------------------------------


def test_narrow_prefill_chunks_are_scored_whole(engine, on, monkeypatch):
    """Many rows share each key there; a row with more blocks than candidates is masked."""
    from dsv4_plugin.engines.vllm import candidates

    used = []
    for name in ("candidate_select", "candidate_logits_ragged"):
        original = getattr(candidates.ops, name)
        monkeypatch.setattr(
            candidates.ops,
            name,
            lambda *a, _original=original, _n=name, **k: used.append(_n) or _original(*a, **k),
        )
    for context, masked in ((1000, False), (2500, True)):
        model = Model(engine, {"prefill": ((context, 9),)})
        got = model()
        want, _ = model.expected(torch.bfloat16)
        assert torch.equal(got[2], want[2])
        assert ("apply_candidate_mask" in names(engine)) is masked
    assert used == []


def in_two_chunks(problem):
    """Cut the chunk of a prefill by rows, as vLLM does: the second one gathers no keys."""
    (chunk,) = problem.metadata.prefill.chunks
    half = chunk.token_start + (chunk.token_end - chunk.token_start) // 2
    for begin, end in ((chunk.token_start, half), (half, chunk.token_end)):
        rows = slice(begin - chunk.token_start, end - chunk.token_start)
        yield dataclasses.replace(
            chunk,
            cu_seqlen_ks=chunk.cu_seqlen_ks[rows].contiguous(),
            cu_seqlen_ke=chunk.cu_seqlen_ke[rows].contiguous(),
            token_start=begin,
            token_end=end,
            skip_kv_gather=begin > chunk.token_start,
        )


PREFILLS = {
    "one request": {"prefill": ((2500, 40),)},
    "three requests": {"prefill": ((2500, 40), (900, 17), (3, 3))},
    "pages of 32 keys": {"prefill": ((1300, 9), (700, 3)), "page_size": 32},
}


@pytest.mark.parametrize("broken", [False, True], ids=["served", "broken"])
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
@pytest.mark.parametrize("batch", PREFILLS.values(), ids=PREFILLS)
def test_keys_are_gathered_for_a_reader_only(engine, on, monkeypatch, batch, wide, broken):
    """A wide chunk of a consumer reads the cache; after a failure vLLM gets the gathered keys."""
    from dsv4_plugin.engines.vllm import candidates

    monkeypatch.setattr(candidates, "WHOLE_COLUMNS", 0 if wide else 1 << 20)
    monkeypatch.setenv("DSV4_TOPK", "fp32")
    if broken:
        name = "engines.vllm.candidates.ops.candidate_select" if wide else "topk"
        real, seen = dsv4_plugin.topk, []

        def fails_at_the_consumer(*args, **kwargs):
            seen.append(args)
            if wide or len(seen) > 4:  # after two chunks of the plain layer and the source
                raise RuntimeError("no kernel image is available")
            return real(*args, **kwargs)

        monkeypatch.setattr(f"dsv4_plugin.{name}", fails_at_the_consumer)
    model = Model(engine, batch)
    model.problem.metadata.prefill.chunks = list(in_two_chunks(model.problem))
    got = model()
    want, blocks = model.expected(torch.float32)
    assert torch.equal(model.candidates[: len(blocks)], blocks)
    if broken:
        check_same_scores(model, got, want)
    else:
        assert all(map(torch.equal, got, want))
    by_engine = names(engine).count("cp_gather_indexer_k_quant_cache")
    readers = 2 if wide and not broken else 3  # a gather for both chunks of a layer
    assert counters().get("gather", 0) + by_engine == readers


def test_deferred_logits_hold_no_memory(engine, on, monkeypatch):
    """The tensor that vLLM gets is one element, whatever its shape says."""
    from dsv4_plugin.engines.vllm import candidates

    seen = []
    original = candidates.apply_mask
    module = engine.indexer
    patched = vars(module)["_apply_candidate_mask"]

    def look(logits, *args, **kwargs):
        seen.append((tuple(logits.shape), logits.untyped_storage().nbytes()))
        return patched(logits, *args, **kwargs)

    model = Model(engine, BATCHES["decode"])
    layers = model.build()
    look.__dict__.update(vars(patched))
    monkeypatch.setitem(vars(module), "_apply_candidate_mask", look)
    model.step(layers)
    # Other code's function is in the way, so nothing was deferred: the logits are vLLM's own.
    assert [bytes_ > 4 for _, bytes_ in seen] == [True]
    monkeypatch.undo()
    assert original is candidates.apply_mask


# --- the engine serves after all ------------------------------------------------------------------


def engine_answers(engine, batch):
    """What vLLM itself selects, with its candidates, on the same problem."""
    model = Model(engine, batch)
    return model(), model.candidates.clone()


def check_same_scores(model, got, want):
    for problem, a, b in zip((model.problem, model.problem, model.other), got, want, strict=True):
        check_scores(model.scores(problem), a, b)


BROKEN = {
    "block_maxima": "source",
    "select_blocks": "source",
    "candidate_select": "consumer",
}


@pytest.mark.parametrize("op", BROKEN)
def test_a_broken_op_leaves_the_layer_to_the_engine(engine, monkeypatch, op, caplog):
    from dsv4_plugin.engines.vllm import candidates

    batch = BATCHES["decode"]
    want, blocks = engine_answers(engine, batch)
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "fp32")

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(candidates.ops, op, broken)
    model = Model(engine, batch)
    got = model()
    check_same_scores(model, got, want)
    a, b = (canonical(x[: len(want[0])]) for x in (model.candidates, blocks))
    if BROKEN[op] == "source":
        assert torch.equal(a, b)
        assert {"select_candidate_blocks", "apply_candidate_mask"} <= set(names(engine))
    else:
        assert "apply_candidate_mask" in names(engine)
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert "no kernel image is available" in line and "vLLM" in line
    again = model()  # and every later step is the engine's
    check_same_scores(model, again, want)


@pytest.mark.parametrize("op", BROKEN)
def test_strict_raises_what_a_broken_op_raises(engine, on, monkeypatch, op):
    from dsv4_plugin.engines.vllm import candidates

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setenv("DSV4_STRICT", "1")
    monkeypatch.setattr(candidates.ops, op, broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        Model(engine, BATCHES["decode"])()


def test_another_reader_of_the_logits_and_nothing_is_deferred(engine, monkeypatch):
    batch = BATCHES["mixed"]
    want, _ = engine_answers(engine, batch)
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "fp32")
    model = Model(engine, batch)
    layers = model.build()
    with another_reader():
        got = model.step(layers)
        assert {"select_candidate_blocks", "apply_candidate_mask"} <= set(names(engine))
    check_same_scores(model, got, want)


def test_candidates_of_another_writer_are_the_engines(engine, on, monkeypatch):
    """The order of vLLM's candidates is unspecified, so its consumers are vLLM's too."""
    monkeypatch.setenv("DSV4_TOPK", "fp32")
    batch = BATCHES["decode"]
    model = Model(engine, batch)
    plain, source, consumer = model.build()
    model.step((plain, source, consumer))
    with engine.gpu(90), engine.config("deepseek_v41"), engine.forward(model.other):
        engine.calls.clear()  # a pass of its own, without the source
        consumer(model.other.hidden, model.other.query, None, model.other.weights)
    assert "apply_candidate_mask" in names(engine)
    want, _ = model.expected(torch.float32)
    got = model.other.buffer[: len(model.other.lengths), : model.other.k]
    check_scores(model.scores(model.other), got, want[2])


@pytest.mark.parametrize(
    "how,words",
    [
        ({"piece": 16}, "16 keys, not 8"),
        ({"blocks": 16}, "16 candidate blocks a row"),
    ],
)
def test_what_is_not_served_goes_to_the_engine_with_the_reason(engine, on, caplog, how, words):
    batch = BATCHES["decode"]
    model = Model(engine, batch, **how)
    got = model()
    assert {"select_candidate_blocks", "apply_candidate_mask"} <= set(names(engine))
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert any(words in line and "source" in line for line in lines)
    assert any("active" in line and "plain" in line and "inactive" not in line for line in lines)
    want, _ = model.expected(torch.float32)
    check_scores(model.scores(model.problem), got[1], want[1])


def test_an_explicit_setting_that_cannot_be_met_is_one_error(engine, on, monkeypatch):
    from dsv4_plugin.errors import UnmetError

    monkeypatch.setenv("DSV4_TOPK", "bf16")
    with pytest.raises(UnmetError, match="16 keys, not 8"):
        Model(engine, BATCHES["decode"], piece=16).build()
    monkeypatch.setenv("DSV4_TOPK", "fp32")
    monkeypatch.setenv("DSV4_LOGITS", "engine")
    with pytest.raises(UnmetError, match="the plugin's own logits"):
        Model(engine, BATCHES["decode"]).build()


SERVED = "bf16 by torch on the plugin's bf16 logits"
NO_LIBRARY = "plugin's logits by torch: the library is not there"
NEEDS_PLUGIN_LOGITS = "candidates are selected from the plugin's own logits"
NO_BLOCKS = "the plugin selects no candidate blocks here, and vLLM's are in no order"
SAID = {  # of each kind what the line says of the top-k: how it is done, or why vLLM does it
    "all served": ((), {}, (SERVED, SERVED, SERVED)),
    "no library": (
        ("block_maxima", "select_blocks", "candidate_select", "paged_logits", "ragged_logits"),
        {},
        ("fp32 by torch on the engine's float32 logits",  # or bf16, where it can write that
         f"the engine's ({NEEDS_PLUGIN_LOGITS}; {NO_LIBRARY})",
         f"the engine's ({NO_BLOCKS}; {NEEDS_PLUGIN_LOGITS}; {NO_LIBRARY})"),
    ),
    "source refused": (
        ("block_maxima",), {}, (SERVED, f"the engine's ({NEEDS_PLUGIN_LOGITS}; {NO_LIBRARY})",
                                f"the engine's ({NO_BLOCKS})"),
    ),
    "consumer refused": (
        (), {"consumer_piece": 16},
        (SERVED, SERVED, "the engine's (candidate blocks have 16 keys, not 8)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("missing,how,said", SAID.values(), ids=SAID)
def test_one_truthful_line_for_each_kind_of_layer(
    engine, on, monkeypatch, caplog, can_bf16, missing, how, said
):
    from dsv4_plugin.ops import dispatch

    real = dispatch.unmet
    monkeypatch.setattr(
        dispatch, "unmet",
        lambda call, backend: ["the library is not there"] if call.op in missing
        else real(call, backend),
    )  # fmt: skip
    model = Model(engine, BATCHES["decode"])
    layers = model.build(**how)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert len(lines) == 3, lines
    if can_bf16:
        said = [
            words.replace(
                "fp32 by torch on the engine's float32", "bf16 by torch on the engine's bf16"
            )
            for words in said
        ]
    served = []
    for kind, words in zip(("plain", "source", "consumer"), said, strict=True):
        (line,) = [x for x in lines if f"DeepSeek-V4.1 {kind} layers" in x]
        assert line.startswith("dsv4 active in vLLM") and f"top-k: {words}" in line
        assert ("not bf16" in line) is words.startswith("fp32")
        assert "key gather: torch at vllm._custom_ops." in line
        served.append("the engine's (" not in words)
    if how:
        return  # its candidates have other sizes than the source's: such a model cannot run
    model.step(layers)
    found = counters()
    assert found["topk.decode"] == sum(served)
    assert found.get("topk.decode.upstream", 0) == 3 - sum(served)
    assert ("candidates.source" in found, "candidates.consumer" in found) == tuple(served[1:])
    assert dsv4_plugin.status()["seams"]["candidates"]["engaged"] is any(served[1:])
    assert not {"candidates.source.engine"} & set(found), "nothing is deferred in vain"


def test_the_kill_switch(engine, monkeypatch):
    want, _ = engine_answers(engine, BATCHES["decode"])
    monkeypatch.setenv("DSV4_PLUGIN", "0")
    model = Model(engine, BATCHES["decode"])
    check_same_scores(model, model(), want)
    assert {"select_candidate_blocks", "apply_candidate_mask"} <= set(names(engine))
    assert counters() == {}


def test_candidates_that_nobody_wrote_are_safe(engine, on):
    """vLLM's buffer is uninitialised before the first source layer: any number may be in it."""
    model = Model(engine, BATCHES["mixed"])
    layers = model.build()
    g = torch.Generator().manual_seed(1)
    shape = model.candidates.shape
    with engine.gpu(90), engine.config("deepseek_v41"), engine.forward(model.other):
        layers[1](model.problem.hidden, model.problem.query, None, model.problem.weights)
        model.candidates.copy_(torch.randint(-(2**31), 2**31, shape, generator=g).int())
        layers[2](model.other.hidden, model.other.query, None, model.other.weights)
    got = model.other.buffer[: len(model.other.lengths), : model.other.k]
    for row, length in zip(got, model.other.lengths, strict=True):
        assert bool(((row >= -1) & (row < max(length, 1))).all())


# --- drafts: vLLM makes a request of each row -----------------------------------------------------


def flatten(problem, rows):
    """Let vLLM's own code make a request of each row; its path without a Triton kernel."""
    planner = importlib.import_module("vllm.v1.attention.backends.mla.indexer")
    metadata = problem.metadata
    decode, requests, tokens = metadata.decode, metadata.num_decodes, metadata.num_decode_tokens
    adaptive = types.SimpleNamespace(enable_adaptive_verification=True)
    width = decode.block_table.shape[1]
    ints = {"dtype": torch.int32}
    builder = types.SimpleNamespace(
        vllm_config=types.SimpleNamespace(speculative_config=adaptive),
        supports_varlen=False,
        decode_seq_lens_buffer=torch.zeros(tokens + 5, **ints),
        decode_lens_buffer=torch.zeros(tokens + 5, **ints),
        expanded_block_table_buffer=torch.zeros(tokens + 5, width, **ints),
        arange_buffer=torch.arange(tokens + 5, **ints),
    )
    lens = torch.full((requests,), rows, **ints)
    lengths, table, each, held, padded = (
        planner.DeepseekV32IndexerMetadataBuilder._prepare_decode_tensors(
            builder, decode.seq_lens[:, -1], decode.block_table, lens, lens,
            torch.arange(requests, **ints) * rows, requests, tokens, False, rows, rows,
        )
    )  # fmt: skip
    assert held == tokens and not padded and bool((each == 1).all())
    tables = {field.name for field in dataclasses.fields(metadata)} & {"block_table"}
    problem.metadata = dataclasses.replace(
        metadata,
        decode=dataclasses.replace(
            decode, block_table=table, seq_lens=lengths.unsqueeze(-1), decode_lens=each,
            decode_is_uniform=True, write_max_decode_len=rows, per_req_decode_lens=lens,
        ),
        **dict.fromkeys(tables, decode.block_table),
    )  # fmt: skip
    return decode.block_table


@pytest.fixture
def requests_of(monkeypatch):
    """Requests and rows of each, of every call that scores keys."""
    from dsv4_plugin.engines.vllm import candidates
    from dsv4_plugin.ops import logits

    seen = []
    for module, name in (
        (candidates.ops, "block_maxima"),
        (candidates.ops, "candidate_select"),
        (logits, "paged_logits"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda q, *a, _original=original, **k: (
                seen.append(q.shape[:2]) or _original(q, *a, **k)
            ),
        )
    return seen


@pytest.mark.parametrize("rows,dtype", [(3, "fp32"), (6, "bf16")])
def test_rows_that_vllm_made_requests_of_are_a_requests_again(
    engine, on, monkeypatch, requests_of, rows, dtype
):
    """Keys are read once for the rows of a request, and slots fit the attention's block table."""
    monkeypatch.setenv("DSV4_TOPK", dtype)
    monkeypatch.setenv("DSV4_LOGITS", "plugin")
    monkeypatch.setenv("DSV4_STRICT", "1")
    importlib.import_module("vllm.models.deepseek_v41.nvidia.flashmla")  # it reads slots
    model = Model(engine, {"decode": (2000, 3333, 700), "next_n": rows})
    table = flatten(model.problem, rows)
    got = model()
    want, blocks = model.expected(DTYPES[dtype])
    assert all(map(torch.equal, got, want))
    assert torch.equal(model.candidates[: len(blocks)], blocks)
    assert requests_of == [(3, rows)] * 3
    note = adapter.current().call.slots
    if not hasattr(model.problem.metadata, "block_table"):  # to 0.31
        assert note is None
        return
    assert note.paged.table.data_ptr() == table.data_ptr() and note.paged.table.shape == table.shape
    chosen = want[2].clamp_min(0).long()
    pages = table.repeat_interleave(rows, 0).gather(1, chosen // 64)
    slots = torch.where(want[2] < 0, -1, pages * 64 + chosen % 64)
    assert torch.equal(note.paged.slots, slots.int())
    assert note.paged.counts.tolist() == (want[2] >= 0).sum(1).tolist()


@pytest.mark.parametrize("heads,rows,shape", [(64, 6, (2, 6)), (64, 3, (6, 1)), (32, 3, (2, 3))])
def test_an_odd_row_of_64_heads_stays_a_request(heads, rows, shape):
    from dsv4_plugin.engines.vllm import wrappers
    from dsv4_plugin.engines.vllm.context import Requests

    given = {
        "q": (torch.zeros(2 * rows, 1, heads, 128), None), "kv_cache": None, "weights": None,
        "context_lens": torch.arange(2 * rows)[:, None], "schedule_metadata": None,
        "block_tables": torch.arange(2 * rows)[:, None].expand(-1, 4), "max_model_len": 9,
    }  # fmt: skip
    mine = wrappers._by_request(given, Requests(rows, None))
    assert mine["q"][0].shape[:2] == mine["context_lens"].shape == shape
    assert mine["context_lens"].flatten().tolist() == list(range(2 * rows))
    assert mine["block_tables"][:, 0].tolist() == list(range(0, 2 * rows, shape[1]))


def uneven(model, modes):
    decode = model.problem.metadata.decode
    model.problem.metadata.decode = dataclasses.replace(decode, decode_is_uniform=False)


def padding(model, modes):
    decode = model.problem.metadata.decode
    model.problem.metadata.decode = dataclasses.replace(decode, write_max_decode_len=4)


def adaptive(model, modes):
    (config,) = adapter.current().configs
    speculative = types.SimpleNamespace(enable_adaptive_verification=True)
    object.__setattr__(config, "speculative_config", speculative)


def mixed_graphs(model, modes):
    (config,) = adapter.current().configs
    config.compilation_config.cudagraph_mode = modes.FULL
    return modes.FULL


def decode_graphs(model, modes):
    (config,) = adapter.current().configs
    config.compilation_config.cudagraph_mode = modes.FULL_AND_PIECEWISE
    return modes.FULL


@pytest.mark.parametrize("change", [uneven, padding, adaptive, mixed_graphs, decode_graphs])
def test_only_where_every_request_is_known_to_have_so_many_rows(engine, on, requests_of, change):
    """A graph for any batch may be replayed with other rows than it was captured with."""
    model = Model(engine, {"decode": (2000, 3333), "next_n": 6})
    flatten(model.problem, 6)
    layers = model.build()
    mode = change(model, importlib.import_module("vllm.config").CUDAGraphMode)
    with model.pass_of() as context:
        context.cudagraph_runtime_mode = mode or context.cudagraph_runtime_mode
        for layer, problem in zip(layers, model.problems, strict=True):
            layer(problem.hidden, problem.query, None, problem.weights)
    want, _ = model.expected(torch.bfloat16)
    assert torch.equal(model.other.buffer[:12, : model.other.k], want[2])
    assert requests_of == [(2, 6) if change is decode_graphs else (12, 1)] * 3


# --- graphs that break at the indexer -------------------------------------------------------------


class Segment:
    """Replaces a CUDA graph: Python runs while the graph is recorded, and never again."""

    def capture_begin(self, pool=None):
        pass

    def capture_end(self):
        pass

    def replay(self):
        pass


@pytest.mark.parametrize("batch", ["mixed", "two rows a request"])
def test_a_breakable_graph_is_served_at_every_replay(engine, on, monkeypatch, batch):
    """vLLM's attention breaks the graph around the indexer's layer, and a replay calls that."""
    attention = importlib.import_module("vllm.models.deepseek_v41.attention").DeepseekV4Attention
    breakable = importlib.import_module("vllm.compilation.breakable_cudagraph")
    monkeypatch.setattr(breakable, "weak_ref_tensor", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Segment)
    model = Model(engine, BATCHES[batch])
    layers = model.build()
    graph = breakable.BreakableCUDAGraphCapture()
    piecewise = importlib.import_module("vllm.config").CUDAGraphMode.PIECEWISE

    def step(run):
        with model.pass_of() as context:
            context.cudagraph_runtime_mode = piecewise
            run()

    def record():
        with graph:
            for layer, problem in zip(layers, model.problems, strict=True):
                owner = types.SimpleNamespace(
                    indexer=types.SimpleNamespace(indexer_op=layer), forward_mqa=lambda *_: None
                )
                q = problem.query
                attention._sparse_indexer_and_attn(
                    owner, problem.hidden, q, None, problem.weights, q, q, q, q
                )

    step(record)
    assert graph.num_eager_breaks == 3
    want, _ = model.expected(torch.bfloat16)
    for _ in range(2):
        before = counters()["candidates.consumer"]
        for problem in model.problems:
            problem.buffer.fill_(7)
        model.candidates.fill_(-7)
        step(graph.replay)
        got = model.other.buffer[: len(model.other.lengths), : model.other.k]
        assert torch.equal(got, want[2])
        assert counters()["candidates.consumer"] > before
    assert not [name for name in counters() if name.endswith((".upstream", ".engine"))]
