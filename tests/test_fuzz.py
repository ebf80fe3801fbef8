"""The fuzzer: it passes here, it finds what is planted, and what it prints repeats the failure."""

import dataclasses
import json
import random
import re
import shlex

import pytest
import torch

from dsv4_plugin import cli, gather_indexer_cache, read_indexer_cache, topk
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.testing.fuzz import cache
from dsv4_plugin.testing.fuzz.case import CaseError, describe, parse
from dsv4_plugin.testing.fuzz.engine import OPS, fuzz, run_case, shrink
from dsv4_plugin.testing.fuzz.topk import TopkCase

KINDS = {name: op.kind for name, op in OPS.items()}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_random_calls_pass():
    """Every op, every backend that runs on a CPU; how much is tried is the command's to say."""
    report = fuzz(seed=20, device="cpu", seconds=25)
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
        assert {line.partition("=")[0] for line, _ in describe(op.kind)} >= {"seed", "backend"}
        assert name == op.kind.op


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("select:seed=1", "begins with its op"),
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
        ("read:only=99", "below tokens"),
    ],
)
def test_a_case_that_means_nothing_is_refused(text, words, capsys):
    with pytest.raises(CaseError, match=words):
        parse(text, KINDS)
    assert cli.main(["fuzz", "--device", "cpu", "--case", text]) == 2
    assert "dsv4-plugin fuzz: " in capsys.readouterr().err


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


def test_an_exception_is_a_finding():
    def breaks(*args, **more):
        raise RuntimeError("out of luck\nand more")

    failure = run_case(TopkCase(), "cpu", breaks)
    assert failure.why == "RuntimeError: out of luck" and not failure.fatal


def test_every_op_has_a_public_function():
    from dsv4_plugin.testing.fuzz.engine import backends_here, function_of

    for name in OPS:
        assert callable(function_of(name))
        assert "torch" in backends_here(name, "cpu")
    assert cache.op_of("gather") is gather_indexer_cache


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
    assert cli.main(["fuzz", *arguments, "--backend", "torch", "--json", str(file)]) == 0
    assert "0 failures" in capsys.readouterr().out
    data = json.loads(file.read_text())
    assert data["failures"] == [] and data["seed"] == 3 and data["machine"]["commit"]
    assert data["ops"]["read"]["cases"] + data["ops"]["gather"]["cases"] == 12
    assert data["ops"]["topk"]["cases"] == 0 and data["ops"]["gather"]["rows"] > 0
    assert any(name.startswith("gather dtype=") for name in data["tried"])


def test_a_failure_is_shown_as_a_command(monkeypatch, capsys):
    import dsv4_plugin.testing.fuzz.engine as engine

    broken = changed(swaps_an_index)
    monkeypatch.setattr(engine, "function_of", lambda op: broken)
    assert cli.main(["fuzz", "--device", "cpu", "--op", "topk", "--minutes", "0.02"]) == 1
    out = capsys.readouterr().out
    (again, *_) = [line for line in out.splitlines() if line.strip().startswith("again")]
    program, *arguments = shlex.split(again.split(None, 1)[1])
    assert program == "dsv4-plugin"
    assert cli.main(arguments) == 1 and "FAILS" in capsys.readouterr().out
    monkeypatch.undo()
    assert cli.main(arguments) == 0 and "passes" in capsys.readouterr().out


def test_an_implementation_that_is_not_there_is_refused(capsys):
    assert cli.main(["fuzz", "--device", "cpu", "--backend", "cuda"]) == 2
    assert "no cuda form on cpu: topk, read" in capsys.readouterr().err
    with pytest.raises(UnmetError, match="fuzzing topk on cpu"):
        fuzz(seed=0, device="cpu", ops=["topk"], cases=1, backends=("cuda",))


def test_the_fields_are_shown(capsys):
    assert cli.main(["fuzz", "--fields", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for op in OPS.values():
        for name in (field.name for field in dataclasses.fields(op.kind)):
            assert f"  {name}=" in shown


def test_without_a_gpu_cuda_is_refused(capsys):
    if torch.cuda.is_available():
        assert fuzz(seed=0, device="cuda", cases=3).cases.total() == 3
    else:
        assert cli.main(["fuzz", "--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err
