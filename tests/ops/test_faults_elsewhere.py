"""The faults of other top-k kernels that docs/faults_elsewhere.md lists, with small tests.

They run for every implementation that this machine can run. tests/ops/test_topk*.py and the fuzzer
cover far more cases. The faults of cache reads are in test_faults_elsewhere_cache.py, the faults
inside engines in tests/engines/*/host.
"""

from __future__ import annotations

import ast
import re

import pytest
import torch
from kits.inputs import poison_tail
from kits.oracles import Ranking, check_selection
from kits.packaging_tools import ROOT
from kits.topk_edges import CAPACITIES, plateau

from dsv4_plugin import envs, topk
from dsv4_plugin.cli.checks.inputs import scores

BACKENDS = ("torch", "cuda")  # the implementations of the top-k
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
FLT_MAX = torch.finfo(torch.float32).max


def ints(values, device, dtype=torch.int32):
    return torch.tensor(list(values), dtype=dtype, device=device)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_no_candidate_is_dropped_where_a_buffer_is_full(capacity, backend, device):
    """As many candidates at the threshold as a buffer may hold, one less, one more, twice that."""
    counts = [capacity - 1, capacity, capacity + 1, 2 * capacity]
    columns = 2 * capacity + 600
    for dtype in (torch.bfloat16, torch.float32):
        logits = plateau(counts, columns, dtype, device)
        lengths = ints([columns] * len(counts), device)
        for k in (512, 2048):
            got = topk(logits, lengths, k, backend=backend)
            check_selection(logits, lengths, k, got)


@dtypes
@pytest.mark.parametrize("kind", ["all_equal", "two_values"])
def test_no_candidate_is_dropped_in_rows_of_few_values(kind, dtype, backend, device):
    logits = scores(kind, 3, 9001, dtype, device=device)
    lengths = ints([9001, 9000, 513], device)
    for k in (512, 2048):
        check_selection(logits, lengths, k, topk(logits, lengths, k, backend=backend))


def test_a_plateau_of_zeros_gives_one_answer(backend, device):
    """25 calls: the same bits, never -1 while a position is left, the lowest of the zeros."""
    logits = scores("relu_sum", 4, 20_000, torch.float32, device=device)
    logits[1].clamp_(max=0.0)
    lengths = ints([20_000, 20_000, 8193, 2049], device)
    answers = [topk(logits, lengths, 2048, backend=backend) for _ in range(25)]
    assert all(torch.equal(answers[0], answer) for answer in answers)
    assert int(answers[0].min()) >= 0
    assert answers[0][1].tolist() == list(range(2048)), "all are zero: the lowest columns"
    check_selection(logits, lengths, 2048, answers[0])


@dtypes
def test_a_rows_answer_is_its_own(dtype, backend, device):
    """Alone, in a batch, at another place, in a wider buffer: the same bits, ties in plenty."""
    bank = scores("crowded", 6, 20_000, dtype, device=device)
    lengths = ints([20_000, 9000, 8192, 513, 512, 19_999], device)
    whole = topk(bank, lengths, 512, backend=backend)
    for r in range(6):
        n = int(lengths[r])
        alone = topk(bank[r : r + 1, :n].contiguous(), lengths[r : r + 1], 512, backend=backend)
        assert torch.equal(alone[0], whole[r])
    order = [5, 3, 0, 0, 1, 4, 2, 2, 2]
    again = topk(bank[order], lengths[order], 512, backend=backend)
    assert torch.equal(again, whole[order])


def test_indices_are_unique_among_the_lowest_numbers(backend, device):
    """-FLT_MAX, -inf and NaN as scores: each position once, NaN last, no padding in between."""
    rows = torch.full((3, 3000), -FLT_MAX, device=device)
    rows[1] = -torch.inf
    rows[2] = torch.nan
    rows[:, 100] = 1.0
    rows[2, 7] = -torch.inf
    lengths = ints([3000] * 3, device)
    for k in (512, 2048):
        got = topk(rows, lengths, k, backend=backend).sort(1).values
        check_selection(rows, lengths, k, got)
        assert int(got.min()) == 0 and bool((got.diff(dim=1) > 0).all())
        assert got[2].tolist() == sorted({100, 7} | set(range(k + 2)) - {7, 100})[:k]


def test_nan_is_selected_last(backend, device):
    logits = torch.full((1, 600), torch.nan, device=device)
    logits[0, 40:560] = torch.arange(520.0, device=device) - 300
    logits[0, 559] = -torch.inf
    got = topk(logits, ints([600], device), 521, backend=backend, sort=True)
    assert got[0, -1] == 0, "one NaN is needed, the first"
    assert got[0, -2] == 559, "after the real -inf"


@dtypes
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_columns_past_the_length_are_not_scores(poison, dtype, backend, device):
    logits = scores("normal", 7, 9000, dtype, device=device)
    lengths = ints([-1, 0, 5, 512, 513, 4097, 8999], device)
    clean = topk(logits, lengths, 512, backend=backend)
    past = torch.arange(9000, device=device) >= lengths[:, None]
    logits.masked_fill_(past, torch.tensor(poison).to(dtype).to(device))
    assert torch.equal(topk(logits, lengths, 512, backend=backend), clean)
    poison_tail(logits, lengths)
    assert torch.equal(topk(logits, lengths, 512, backend=backend), clean)
    Ranking(logits, lengths).check(clean, 512)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("stride", [5000, 5001, 9000])
def test_a_stride_is_not_a_width(stride, offset, backend, device):
    """Rows further apart than they are wide, at any address; what lies between is NaN."""
    want = scores("normal", 4, 5000, torch.bfloat16, device=device)
    buffer = torch.full((offset + 4 * stride,), torch.nan, dtype=torch.bfloat16, device=device)
    logits = buffer.as_strided((4, 5000), (stride, 1), offset)
    logits.copy_(want)
    lengths = ints([5000, 4999, 513, 0], device)
    got = topk(logits, lengths, 512, backend=backend)
    assert torch.equal(got, topk(want, lengths, 512, backend=backend))
    check_selection(want, lengths, 512, got)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_lengths_may_be_padded_and_strided(index, backend, device):
    """[batch, next_n], a column of a table, every second entry: all the same call."""
    logits = scores("normal", 6, 3000, torch.float32, device=device)
    plain = ints([3000, 2999, 700, 699, 1, 0], device, index)
    want = topk(logits, plain, 512, next_n=2, backend=backend)
    padded = torch.full((3, 5), 77, dtype=index, device=device)
    padded[:, :2] = plain.view(3, 2)
    assert not padded[:, :2].is_contiguous()
    table = torch.full((6, 3), 77, dtype=index, device=device)
    table[:, 1] = plain
    for form in (padded[:, :2], table[:, 1]):
        assert torch.equal(topk(logits, form, 512, next_n=2, backend=backend), want)
    check_selection(logits, plain, 512, want)


def test_rows_of_padding_are_minus_one(backend, device):
    """Lengths of zero and below, rows of no columns, calls of no rows."""
    logits = torch.full((4, 700), torch.nan, device=device)
    got = topk(logits, ints([0, -1, -(2**31), 700], device), 600, backend=backend)
    assert bool((got[:3] == -1).all()) and got[3].tolist() == list(range(600))
    none = topk(logits[:, :0], ints([3] * 4, device), 5, backend=backend)
    assert bool((none == -1).all())
    assert topk(logits[:0], ints([], device), 5, backend=backend).shape == (0, 5)


def test_offsets_past_two_gib(backend, device):
    """Rows 2^31 + 64 elements apart, in memory that is never touched in between."""
    far, columns = (1 << 31) + 64, 3000
    buffer = torch.empty(far + columns, dtype=torch.bfloat16, device=device)
    logits = buffer.as_strided((2, columns), (far, 1))
    logits.copy_(scores("normal", 2, columns, torch.bfloat16, device=device))
    lengths = ints([columns, columns - 1], device)
    check_selection(logits, lengths, 512, topk(logits, lengths, 512, backend=backend))


def test_every_index_once_just_over_a_boundary(backend, device):
    """Lengths of 32,763 to 32,773: where 115 of 512 slots once were unique."""
    lengths = ints(range(32_763, 32_774), device)
    logits = scores("normal", len(lengths), 32_780, torch.float32, device=device)
    for k in (512, 2048):
        got = topk(logits, lengths, k, backend=backend)
        assert all(len(set(row)) == k for row in got.tolist())
        check_selection(logits, lengths, k, got)


def test_a_dirty_output_is_written_whole(backend, device):
    """No slot keeps its old content, and no call leaves state for the next."""
    lengths = ints([-1, 3, 512, 900, 6000], device)
    logits = scores("relu_sum", 5, 6000, torch.bfloat16, device=device)
    want = topk(logits, lengths, 512, backend=backend)
    for dirt in (0x7FFFFFFF, -1, 0, 5):
        out = torch.full((5, 512), dirt, dtype=torch.int32, device=device)
        topk(logits.neg(), lengths, 512, out=out, backend=backend)
        out.fill_(dirt)
        assert topk(logits, lengths, 512, out=out, backend=backend) is out
        assert torch.equal(out, want)


def test_buffers_are_the_callers(backend, device):
    """A call fills the caller's buffers in place, and reads its inputs again each time."""
    logits = scores("normal", 2, 40_000, torch.bfloat16, device=device)
    lengths, out = ints([0, 0], device), torch.zeros(2, 512, dtype=torch.int32, device=device)
    address = out.data_ptr()
    for n in (32_767, 32_768, 32_769, 32_772, 40_000):
        lengths.fill_(n)
        topk(logits, lengths, 512, out=out, backend=backend)
        assert out.data_ptr() == address
        check_selection(logits, lengths, 512, out)


# ---- The kernels' source -------------------------------------------------------------------------


def kernels() -> str:
    """All of csrc without comments."""
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h")]
    text = "\n".join(p.read_text() for p in sorted(files))
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def test_no_cta_spins_on_another_through_memory():
    """Hardware clusters and their barriers only: no flag, lock or counter in global memory."""
    bits = "atomicOr(chosen() + "  # in shared memory, and no thread waits for one
    assert bits in kernels()
    text = kernels().replace(bits, "")
    assert "barrier.cluster" in text and "cudaOccupancyMaxActiveClusters" in text
    for word in (r"atomic(CAS|Exch|Inc|Dec|Or)", r"__nanosleep", r"cooperative_groups", r"\.gpu\.",
                 r"ld\.(acquire|relaxed)\.gpu", r"\b(red|atom)\.global", "grid_group"):  # fmt: skip
        assert not re.search(word, text), word
    assert set(re.findall(r"[\w.:]*try_wait[\w.:]*", text)) <= {
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64"
    }, "a wait within the cluster"


def test_no_gpu_is_written_into_the_kernels():
    """The kernels read the number of multiprocessors and the shared memory from the device."""
    text = kernels()
    assert not re.search(r"\b(78|108|114|132|144|227|228)\b", text)
    assert not re.search(r"\b(232448|233472|101376|102400)\b", text)
    assert "cudaDevAttrMultiProcessorCount" in text
    assert "cudaDevAttrMaxSharedMemoryPerBlockOptin" in text


def test_no_workspace_and_no_state():
    """Nothing that one call could leave for the next: no device globals, no memory of our own."""
    text = kernels()
    variable = r"^\s*(static\s+|inline\s+)*__device__\s+[\w<>:]+\s+\w+\s*(=|;|\[)"
    for word in (r"cuda(Malloc|Memset|HostAlloc|Free)", r"(Device|Stream)Synchronize",
                 r"__managed__", variable):  # fmt: skip
        assert not re.search(word, text, re.M), word


# ---- The package ---------------------------------------------------------------------------------


def test_no_variable_has_an_engines_prefix():
    assert envs.VARIABLES and all(v.name.startswith("DSV4_") for v in envs.VARIABLES)


# ---- docs/faults_elsewhere.md ------------------------------------------------------------------

PAGE = (ROOT / "docs" / "faults_elsewhere.md").read_text()
NAMED = re.findall(r"`(tests/[\w./]+\.py)::(\w+)`", PAGE)


def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def test_every_test_that_the_page_names_exists():
    assert len(NAMED) > 40
    for path, name in NAMED:
        assert name.startswith("test_") and name in functions_of(path), f"{path}::{name}"


def test_every_test_is_on_the_page():
    for path in (
        "tests/ops/test_faults_elsewhere.py",
        "tests/ops/test_faults_elsewhere_cache.py",
        "tests/ops/test_faults_elsewhere_gpu.py",
    ):
        about = {
            name for name in functions_of(path) if name.startswith("test_every_") and "page" in name
        }
        own = {name for name in functions_of(path) if name.startswith("test_")} - about
        assert own <= {name for file, name in NAMED if file == path}, path


def test_every_line_of_the_page_has_a_reference_and_a_test():
    rows = re.split(r"^(?=\d+\. )", PAGE, flags=re.M)[1:]
    assert [int(row.partition(".")[0]) for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 19
    for row in rows:
        happened, _, promise = row.partition("**Promise.** ")
        assert re.search(r"[\w.-]+#\d+|itself", happened), row
        assert "::test_" in promise.partition("**Tests.** ")[2], row
