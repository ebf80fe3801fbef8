"""The fuzzer: it passes here, it finds what is planted, and what it prints repeats the failure."""

import dataclasses
import json
import os
import random
import re
import shlex

import pytest
import torch

from dsv4_plugin import (
    block_maxima,
    candidate_logits,
    candidate_logits_ragged,
    candidate_select,
    gather_indexer_cache,
    paged_logits,
    ragged_logits,
    read_indexer_cache,
    select,
    select_blocks,
    select_candidates,
    topk,
)
from dsv4_plugin.errors import UnmetError
from tests.fuzz import command
from tests.fuzz.case import CaseError, describe, function_of, parse
from tests.fuzz.engine import OPS, fuzz, run_case, shrink
from tests.fuzz.topk import TopkCase

KINDS = OPS


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_random_calls_pass():
    """Every op, every backend that runs on a CPU; a minute in CI."""
    report = fuzz(seed=20, device="cpu", seconds=60 if os.environ.get("DSV4_CI") == "1" else 25)
    assert [(f.why, str(f.shrunk)) for f in report.failures] == []
    assert sum(report.cases.values()) >= 20 and report.cases["topk"] >= 10
    assert report.refused.total() == 0


def test_a_case_is_its_own_repetition():
    """Drawn twice it is the same; written and read it is the same; both ways of every op."""
    for name, op in OPS.items():
        for seed in range(30):
            for device, backends in (("cpu", ("torch",)), ("cuda", ("cuda", "triton", "torch"))):
                case = op.draw(seed, device, backends)
                assert case == op.draw(seed, device, backends)
                assert parse(str(case), KINDS) == case
                case.check()
        assert {line.partition("=")[0] for line, _ in describe(op)} >= {"seed", "backend"}
        assert name == op.op


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scores:seed=1", "begins with its op"),
        ("topk:rows=1", "has the fields"),
        ("topk:seed=__import__", "must be an integer"),
        ("topk:k=4096", "k must be 1 to 2048"),
        ("topk:dtype=float64", "must be one of bfloat16"),
        ("topk:lengths=1/2", "lengths must have 1 entries"),
        ("topk:lengths=one", "full, any or integers"),
        ("topk:keep=3/4", "keep must be two of 1"),
        ("topk:raw=1", "raw needs pages"),
        ("topk:graph=1,streams=1", "exclude each other"),
        ("read:head=6", "multiple of 4"),
        ("read:keep=99/99", "keep must be two of 16"),
        ("paged_logits:requests=2,lengths=1/2/3", "lengths must have 2 entries"),
        ("paged_logits:loose=1,form=batch", "loose needs a form"),
        ("paged_logits:flat=1,next_n=2", "flat needs next_n 1"),
        ("paged_logits:pad=2", "multiples of 4 bytes apart"),
        ("select:raw=1", "raw needs page"),
        ("ragged_logits:keep=0/1", "keep must be two of 1"),
        ("ragged_logits:queries=2,starts=any,ends=5", "ends must have 2 entries"),
        ("ragged_logits:head=6", "multiple of 4"),
        ("block_maxima:requests=2,lengths=1/2/3", "lengths must have 2 entries"),
        ("candidate_logits:out=5", "out must be 0 or -1"),
        ("candidate_logits_ragged:head=6", "multiple of 4"),
        ("select_blocks:keep=3/4", "keep must be two of 1"),
        ("select_candidates:chosen=none", "must be one of visible, all, any"),
    ],
)
def test_a_case_that_means_nothing_is_refused(text, words, capsys):
    with pytest.raises(CaseError, match=words):
        parse(text, KINDS)
    assert command.main(["--device", "cpu", "--case", text]) == 2
    assert "python -m tests.fuzz: " in capsys.readouterr().err


# ---- Planted mistakes ----------------------------------------------------------------------------


def changed(index):
    """A top-k whose answer `index(logits, out)` spoils in place, with or without an `out`."""

    def op(logits, lengths, k, **more):
        out = topk(logits, lengths, k, **more)
        index(logits, lengths, out)
        return out

    return op


def drops_a_tie(logits, lengths, out):
    """Of equal scores the last is taken where the first was right."""
    for row, n, picked in zip(logits.float(), lengths.tolist(), out, strict=True):
        last = int(picked[-1])
        if 0 <= last < n - 1 and row[last] == row[n - 1]:
            picked[-1] = n - 1


def swaps_an_index(logits, lengths, out):
    """A neighbour of the right column."""
    if out.shape[1] > 3:
        out[:, 3] = torch.where(out[:, 3] >= 0, out[:, 3] ^ 1, out[:, 3])


def reads_past_the_length(logits, lengths, k, **more):
    more.pop("next_n"), more.pop("row_starts")
    return topk(logits, torch.full_like(lengths, logits.shape[1]), k, next_n=1, **more)


def writes_past_its_row(logits, lengths, out):
    if out.storage_offset() >= 1:
        out.as_strided((1,), (1,), out.storage_offset() + (len(out) - 1) * out.stride(0)
                       + out.shape[1]).fill_(0)  # fmt: skip


def writes_to_the_scores(logits, lengths, out):
    logits[-1, -1] = 3.0


def forgets_the_last_row(logits, lengths, out):
    if len(out) > 2:
        out[-1] = 0x7FFFFFF0


PLANTED = {
    "drops a tie": (changed(drops_a_tie), "lowest index", {"form": "rows", "starts": 0}),
    "swaps an index": (changed(swaps_an_index), "twice|outside|larger|lowest|slot", {}),
    "reads past the length": (reads_past_the_length, "", {"next_n": 1, "starts": 0}),
    "writes past its row": (changed(writes_past_its_row), "around out|around out_raw", {}),
    "writes to the scores": (changed(writes_to_the_scores), "was written to|", {}),
    "forgets the last row": (changed(forgets_the_last_row), "", {}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found_and_shrunk(name):
    function, words, fixed = PLANTED[name]
    found = None
    for seed in range(200):
        r = random.Random(seed)
        case = OPS["topk"].draw(r.randint(0, 1 << 30), "cpu", ("torch",)).but(graph=0, **fixed)
        if case.columns * case.rows > 20_000:
            continue
        found = run_case(case, "cpu", function)
        if found:
            break
    assert found, "not found in 200 cases"
    small = shrink(found, "cpu", function, seconds=20)
    case = small.shrunk
    assert isinstance(case, TopkCase)
    again = parse(str(case), KINDS)
    failure = run_case(again, "cpu", function)
    assert failure and failure.why == small.why
    assert re.search(words, small.why), small.why
    assert run_case(again, "cpu") is None, "the case is right without what was planted"
    assert case.rows * case.columns <= 64 and case.k <= 8, str(case)
    assert len(str(case)) < 120


def test_a_batch_that_must_be_whole_stays_whole():
    """A mistake that needs three rows is shrunk to three, not lost by looking at one."""
    function = PLANTED["forgets the last row"][0]
    case = TopkCase(requests=40, columns=300, lengths="any", k=16)
    small = shrink(run_case(case, "cpu", function), "cpu", function, seconds=20)
    assert small.shrunk.rows == 3


def rounds_twice(cache, slots, *, out, **more):
    read_indexer_cache(cache, slots, out=out, **more)
    out.mul_(1.0009765625).bfloat16()
    return out


def shifts_a_page(cache, table, cu, **more):
    return gather_indexer_cache(cache, (table + 1).where(table >= 0, table), cu, **more)


@pytest.mark.parametrize(("op", "function"), [("read", rounds_twice), ("gather", shifts_a_page)])
def test_mistakes_of_the_reads_are_found_and_shrunk(op, function):
    for seed in range(60):
        case = OPS[op].draw(seed, "cpu", ("torch",))
        found = run_case(case, "cpu", function)
        if found:
            break
    assert found
    small = shrink(found, "cpu", function, seconds=15)
    assert small.shrunk.rows == 1, str(small.shrunk)
    assert run_case(parse(str(small.shrunk), KINDS), "cpu", function).why == small.why
    assert run_case(small.shrunk, "cpu") is None


def another_weight(q, cache, weights, *more, **named):
    """The last head has the weight of the first."""
    weights = weights.clone()
    weights[:, -1] = weights[:, 0] + 0.1
    return paged_logits(q, cache, weights, *more, **named)


def another_page(q, cache, weights, lengths, table, **named):
    return paged_logits(q, cache, weights, lengths, table + 1, **named)


def writes_past_the_length(q, cache, weights, lengths, table, **named):
    out = paged_logits(q, cache, weights, lengths, table, **named)
    for row, n in zip(out, lengths.reshape(-1).tolist(), strict=False):
        if 0 <= n < len(row):
            row[n] = 0.0
    return out


def one_unit_more(out):
    """Of float32 that was written, in place: within the bound, so float64 does not tell."""
    if out.dtype == torch.float32:
        written = (out.view(torch.int32) != 0xABABABAB - (1 << 32)) & out.isfinite()
        out.copy_(torch.nextafter(out, out.new_tensor(torch.inf)).where(written, out))


def looks_at_the_row_before(op):
    def wrong(*arguments, **named):
        out = op(*arguments, **named)
        one_unit_more(out[1:])
        return out

    return wrong


def looks_at_its_request(q, *more, **named):
    """Rows that have another of their own request before them."""
    out = paged_logits(q, *more, **named)
    if q.dim() == 4 and q.shape[1] > 1:
        one_unit_more(out[1 :: q.shape[1]])
    return out


def drops_the_last_key(q, k, scale, weights, starts, ends, **named):
    return ragged_logits(q, k, scale, weights, starts, ends.clamp(max=len(k)) - 1, **named)


def begins_a_key_late(q, k, scale, weights, starts, ends, **named):
    return ragged_logits(q, k, scale, weights, starts + 1, ends + 1, **named)


def selects_on_other_scores(q, cache, weights, lengths, table, k, **named):
    return select(q, cache, -weights, lengths, table, k, **named)


def selects_on_another_page(q, cache, weights, lengths, table, k, **named):
    return select(q, cache, weights, lengths, table + 1, k, **named)


BEFORE = looks_at_the_row_before
MISTAKES = {  # op, function, what is said, rows that remain
    "another weight": ("paged_logits", another_weight, "float64", 1),
    "another page": ("paged_logits", another_page, "float64", 1),
    "past the length": ("paged_logits", writes_past_the_length, "past a row's length", 1),
    "the row before": ("paged_logits", BEFORE(paged_logits), "alone|reversed", 2),
    "the row before, of its request": ("paged_logits", looks_at_its_request, "alone", 2),
    "the last key": ("ragged_logits", drops_the_last_key, "float64", 1),
    "a key late": ("ragged_logits", begins_a_key_late, "float64", 1),
    "the ragged row before": ("ragged_logits", BEFORE(ragged_logits), "alone|reversed", 2),
    "other scores": ("select", selects_on_other_scores, "larger|two ops", 1),
    "another page selected": ("select", selects_on_another_page, "larger|lowest|two ops", 1),
}


def found_and_shrunk(op, function, words, rows):
    """Plant a mistake, find it and shrink the case; returns the small case and ``rows``."""
    for seed in range(100):
        found = run_case(OPS[op].draw(seed, "cpu", ("torch",)), "cpu", function)
        if found:
            break
    assert found, "not found in 100 cases"
    small = shrink(found, "cpu", function, seconds=15)
    again = parse(str(small.shrunk), KINDS)
    assert run_case(again, "cpu", function).why == small.why
    assert re.search(words, small.why), small.why
    assert run_case(again, "cpu") is None, "the case is right without what was planted"
    return again, rows


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_the_logits_are_found_and_shrunk(name):
    again, rows = found_and_shrunk(*MISTAKES[name])
    assert again.rows == rows and again.heads <= 2 and again.columns <= 64, str(again)
    assert len(str(again)) < 100, str(again)


def without_the_pin(q, cache, weights, lengths, table, **named):
    """The newest block has the score of its keys."""
    out = block_maxima(q, cache, weights, lengths, table, **named)
    return out.copy_(out.where(out != torch.inf, 1.0))


def a_block_too_many(q, cache, weights, lengths, table, **named):
    out = block_maxima(q, cache, weights, lengths, table, **named)
    per_row = lengths.reshape(-1).tolist()
    if len(per_row) == len(out):
        for row, n in zip(out, per_row, strict=True):
            at = -(-n // named["piece"])
            if 0 <= at < len(row):
                row[at] = 0.0
    return out


def blocks_of_whole_keys(maxima, lengths, k, **named):
    """A partial block is forgotten."""
    return select_blocks(maxima, lengths // named["piece"] * named["piece"], k, **named)


def unordered(found, k):
    if k > 1:
        turned = found[:, :2].flip(1)
        found[:, :2] = turned.where((turned >= 0).all(1, keepdim=True), found[:, :2])
    return found


def blocks_in_no_order(maxima, lengths, k, **named):
    return unordered(select_blocks(maxima, lengths, k, **named), k)


def past_the_length(q, cache, weights, chosen, lengths, table, **named):
    """Every key of a candidate is scored."""
    return candidate_logits(q, cache, weights, chosen, lengths + 7, table, **named)


def a_candidate_of_the_row_before(q, cache, weights, chosen, *more, **named):
    chosen = chosen.clone()
    chosen[1:, 0] = chosen[:-1, 0].clone()
    return candidate_logits(q, cache, weights, chosen, *more, **named)


def from_the_first_key(q, k, scale, weights, chosen, starts, ends, **named):
    """Blocks that count from the first key of all, not of the row."""
    starts = torch.zeros_like(starts).where(starts >= 0, starts)
    return candidate_logits_ragged(q, k, scale, weights, chosen, starts, ends, **named)


def columns_in_place_of_positions(logits, chosen, lengths, k, **named):
    every = torch.arange(chosen.shape[1]).int().expand_as(chosen).where(chosen >= 0, chosen)
    return select_candidates(logits, every, lengths, k, **named)


def a_key_beside(*arguments, **named):
    out = candidate_select(*arguments, **named)
    out[:, :1] += 1
    return out


def holes_are_keys(logits, chosen, lengths, k, **named):
    """Candidates that are none are taken for block 0."""
    return select_candidates(logits, chosen.clamp(min=0), lengths, k, **named)


CANDIDATE_MISTAKES = {  # op, function, what is said, rows that remain
    "no pin": ("block_maxima", without_the_pin, "not its keys'", 1),
    "a block too many": ("block_maxima", a_block_too_many, "past a row's blocks", 1),
    "whole blocks": ("select_blocks", blocks_of_whole_keys, "stable sort|count", 1),
    "no order": ("select_blocks", blocks_in_no_order, "stable sort", 1),
    "past the length": ("candidate_logits", past_the_length, "all keys|row sees", 1),
    "the row before": ("candidate_logits", a_candidate_of_the_row_before, "all keys|row sees", 2),
    "the first key": ("candidate_logits_ragged", from_the_first_key, "all keys|row sees", 1),
    "columns": ("select_candidates", columns_in_place_of_positions, "stable sort|does not see", 1),
    "holes": ("select_candidates", holes_are_keys, "stable sort|count", 1),
    "another key": ("candidate_select", a_key_beside, "stable sort|does not see|slot", 1),
}


@pytest.mark.parametrize("name", CANDIDATE_MISTAKES)
def test_mistakes_of_the_candidate_ops_are_found_and_shrunk(name):
    again, rows = found_and_shrunk(*CANDIDATE_MISTAKES[name])
    assert again.rows == rows and again.columns <= 64, str(again)
    assert len(str(again)) < 130, str(again)


def test_no_input_of_the_logits_may_be_written_to():
    """Nor anything around the result, whatever the op."""
    cases = {
        "paged_logits": ("q", "the cache", "weights", "lengths", "block_table"),
        "ragged_logits": ("q", "k", "k_scale", "weights", "row_starts", "row_ends"),
        "block_maxima": ("q", "the cache", "weights", "lengths", "block_table"),
        "select_blocks": ("the scores", "lengths"),
        "candidate_logits": ("q", "the cache", "weights", "candidates", "lengths", "block_table"),
        "candidate_logits_ragged": ("q", "k", "k_scale", "weights", "candidates", "row_starts"),
        "candidate_select": ("q", "the cache", "weights", "candidates", "lengths", "block_table"),
        "select_candidates": ("the scores", "candidates", "lengths"),
    }
    for op, names in cases.items():
        right = function_of(op)
        case = parse(f"{op}:codes=1,heads=2" if "q" in names else f"{op}:k=8", KINDS)
        for at, name in enumerate(names):

            def wrong(*arguments, at=at, right=right, **named):
                out = right(*arguments, **named)
                arguments[at].view(-1)[-1] += 1
                return out

            assert run_case(case, "cpu", wrong).why == f"{name} was written to", (op, name)

        def spills(*arguments, right=right, **named):
            out = right(*arguments, **named)
            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0)
            return out

        assert re.match("around out: .* behind it", run_case(case, "cpu", spills).why)


def test_the_content_of_a_request_does_not_depend_on_what_is_kept():
    """Else shrinking to a row would draw another row."""
    from tests.fuzz.logits import PagedLogitsCase, RaggedLogitsCase
    from tests.fuzz.logits_run import problem_of

    whole = PagedLogitsCase(
        seed=5, requests=5, next_n=2, lengths="any", loose=1, width=3, pages=15, table="shuffled",
        gone=1,
    )  # fmt: skip
    some = problem_of(whole.but(keep="2/3"), "cpu")
    every = problem_of(whole, "cpu")
    for name in ("bytes", "weights", "per_row"):
        assert torch.equal(getattr(some, name), getattr(every, name)[4:8]), name
    assert torch.equal(some.table, every.table[2:4]) and torch.equal(some.pages, every.pages)
    rows = RaggedLogitsCase(seed=5, queries=9, keys=100, starts="any", ends="any")
    a, b = problem_of(rows.but(keep="3/5"), "cpu"), problem_of(rows, "cpu")
    for name in ("bytes", "weights", "starts", "ends"):
        assert torch.equal(getattr(a, name), getattr(b, name)[3:6]), name
    assert torch.equal(a.k, b.k) and torch.equal(a.scale, b.scale)


def test_the_candidates_of_a_request_do_not_depend_on_what_is_kept():
    from tests.fuzz.candidate_selections import SelectCandidatesCase, problem_of

    whole = SelectCandidatesCase(
        seed=3,
        requests=5,
        next_n=2,
        lengths="any",
        held=9,
        keys=300,
        pages=7,
        k=5,
        poison="low",
    )
    for per_row in (0, 1):
        case = whole.but(per_row=per_row)
        some, every = problem_of(case.but(keep="2/3"), "cpu"), problem_of(case, "cpu")
        for name in ("scores", "chosen", "per_row"):
            assert torch.equal(getattr(some, name), getattr(every, name)[4:8]), name
        kept = slice(4, 8) if per_row else slice(2, 4)
        assert torch.equal(some.table, every.table[kept])


def test_a_case_that_names_cuda_is_one_that_the_kernels_take():
    """Alignment, heads, head_dim and block_size, by what the dispatch asks for."""
    from tests.fuzz.logits_run import problem_of

    ops = ("paged_logits", "ragged_logits", "select", "block_maxima", "candidate_logits",
           "candidate_logits_ragged", "candidate_select")  # fmt: skip
    for op in ops:
        looked_at = 0
        for seed in range(60):
            case = OPS[op].draw(seed, "cuda", ("cuda", "torch"))
            if case.backend != "cuda" or getattr(case, "pad", 0) > 1000:  # gigabytes of padding
                continue
            with pytest.raises(UnmetError) as refused:
                problem_of(case, "cpu").served()
            text = str(refused.value)
            assert "not on a CUDA device" in text, text
            assert not re.search("heads|head_dim|block_size|multiples|piece|candidates", text), (
                str(case),
                text,
            )
            looked_at += 1
        assert looked_at > 5


def test_an_exception_is_a_finding():
    def breaks(*args, **more):
        raise RuntimeError("out of luck\nand more")

    failure = run_case(TopkCase(), "cpu", breaks)
    assert failure.why == "RuntimeError: out of luck" and not failure.fatal


def test_every_op_has_a_public_function():
    from tests.fuzz.engine import backends_here, function_of

    assert tuple(OPS) == command.FUZZED  # what the command line offers without importing torch
    for name in OPS:
        assert callable(function_of(name))
        assert "torch" in backends_here(name, "cpu")
    assert function_of("gather") is gather_indexer_cache


# ---- The command ---------------------------------------------------------------------------------


def test_the_results_file(tmp_path, capsys):
    file = tmp_path / "fuzz.json"
    arguments = [
        "--device",
        "cpu",
        "--cases",
        "12",
        "--seed",
        "3",
        "--op",
        "read",
        "--op",
        "gather",
    ]
    assert command.main([*arguments, "--backend", "torch", "--json", str(file)]) == 0
    assert "0 failures" in capsys.readouterr().out
    data = json.loads(file.read_text())
    assert data["failures"] == [] and data["seed"] == 3 and data["machine"]["commit"]
    assert data["ops"]["read"]["cases"] + data["ops"]["gather"]["cases"] == 12
    assert data["ops"]["topk"]["cases"] == 0 and data["ops"]["gather"]["rows"] > 0
    assert any(name.startswith("gather dtype=") for name in data["tried"])


def test_a_failure_is_shown_as_a_command(monkeypatch, capsys):
    import tests.fuzz.engine as engine

    broken = changed(swaps_an_index)
    monkeypatch.setattr(engine, "function_of", lambda op: broken)
    assert command.main(["--device", "cpu", "--op", "topk", "--minutes", "0.02"]) == 1
    out = capsys.readouterr().out
    (again, *_) = [line for line in out.splitlines() if line.strip().startswith("again")]
    *program, arguments = re.split(r" (?=--device)", again.split(None, 1)[1], maxsplit=1)
    assert program == ["python -m tests.fuzz"]
    arguments = shlex.split(arguments)
    assert command.main(arguments) == 1 and "FAILS" in capsys.readouterr().out
    monkeypatch.undo()
    assert command.main(arguments) == 0 and "passes" in capsys.readouterr().out


def test_an_implementation_that_is_not_there_is_refused(capsys):
    assert command.main(["--device", "cpu", "--backend", "cuda"]) == 2
    assert "no cuda form on cpu: topk, read" in capsys.readouterr().err
    with pytest.raises(UnmetError, match="fuzzing topk on cpu"):
        fuzz(seed=0, device="cpu", ops=["topk"], cases=1, backends=("cuda",))


def test_the_fields_are_shown(capsys):
    assert command.main(["--fields", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for op in OPS.values():
        for name in (field.name for field in dataclasses.fields(op)):
            assert f"  {name}=" in shown


def test_without_a_gpu_cuda_is_refused(capsys):
    if torch.cuda.is_available():
        assert fuzz(seed=0, device="cuda", cases=3).cases.total() == 3
    else:
        assert command.main(["--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_the_progress_says_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "EVERY", 0.0)
    given = ["--device", "cpu", "--backend", "torch", "--op", "topk", "--cases", "3"]
    assert command.main([*given, "--minutes", "10"]) == 0
    *progress, last = capsys.readouterr().out.splitlines()
    for number, line in enumerate(progress, 1):
        assert re.fullmatch(
            rf"\[ +\S+ s, (9:5\d|10:00) left\] 0 failures; {number} cases .* rows", line
        )
    assert len(progress) == 3 and "topk 3 cases" in last
