"""``torch.ops.dsv4.*``: schemas, fakes, compilation, and the direct call around the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kits.inputs import mxfp4_cache
from kits.logits_cases import paged as draw_paged
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_plugin import (
    block_maxima,
    candidate_logits,
    candidate_logits_ragged,
    candidate_select,
    gather_indexer_cache,
    paged_logits,
    ragged_logits,
    read_indexer_cache,
    read_indexer_cache_mxfp4,
    select,
    select_blocks,
    select_candidates,
    topk,
)
from dsv4_plugin.cli.checks.inputs import fp8_cache
from dsv4_plugin.ops import torch_library

K = 8


def slots() -> torch.Tensor:
    return torch.tensor([3, -1, 64, 191, 0])


def paged() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences of 70 and 5 keys."""
    table = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32)
    return table, torch.tensor([0, 70, 75], dtype=torch.int32)


def logits(rows: int = 4, columns: int = 40) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def lengths() -> torch.Tensor:
    return torch.tensor([40, 12, 5, 0], dtype=torch.int32)


def pages() -> torch.Tensor:
    return torch.arange(12, dtype=torch.int32).reshape(4, 3)


def new(rows: int = 4) -> torch.Tensor:
    return torch.full((rows, K), -7, dtype=torch.int32)


def scored(next_n: int = 1, lengths: tuple[int, ...] = (64, 30, 5, 9)) -> tuple[torch.Tensor, ...]:
    """Arguments of the paged logits, 4 rows; uint8, because opcheck does arithmetic with them."""
    q, *rest = draw_paged(list(lengths), next_n, heads=2).arguments
    return q.view(torch.uint8), *rest


def full(next_n: int = 1) -> tuple[torch.Tensor, ...]:
    """The same with rows that fill the table: no column of a new result is uninitialised."""
    return scored(next_n, (64,) * 4)


def windows() -> tuple[torch.Tensor, ...]:
    """Arguments of the ragged logits: 4 rows, 20 keys, a window of all of them."""
    q, cache, weights, _, _ = full()
    keys = cache[0, : 20 * 128].reshape(20, 128)
    start = torch.zeros(4, dtype=torch.int32)
    return q[:, 0], keys, torch.ones(20), weights, start, start + 20


def chosen_blocks() -> torch.Tensor:
    """Candidates for rows of 64 keys: two blocks each, a third where there is one."""
    return torch.tensor([[0, 3, 7], [1, 3, -1], [0, -1, -1], [0, 1, 2]], dtype=torch.int32)


def with_candidates(next_n: int = 1) -> tuple[torch.Tensor, ...]:
    q, cache, weights, n, table = scored(next_n)
    return q, cache, weights, chosen_blocks(), n, table


def windows_with_candidates() -> tuple[torch.Tensor, ...]:
    q, keys, scale, weights, starts, ends = windows()
    return q, keys, scale, weights, chosen_blocks(), starts, ends


def of_candidates() -> tuple[torch.Tensor, ...]:
    """Arguments of the selection among candidates, but for k."""
    return logits(4, 24), chosen_blocks(), torch.tensor([64, 30, 5, 20], dtype=torch.int32)


def op_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Every op and arguments that between them use every optional tensor."""
    fp8, fp4 = fp8_cache(3), mxfp4_cache(3)
    table, cu = paged()
    values, scales = torch.zeros(75, 128, dtype=torch.uint8), torch.zeros(75)
    return {
        "read_indexer_cache": [(fp8, slots()), (fp8, slots(), 64, 128, torch.bfloat16)],
        "read_indexer_cache_out": [(fp8, slots(), torch.zeros(5, 128))],
        "read_indexer_cache_mxfp4": [(fp4, slots()), (fp4, slots(), 64, 128, torch.bfloat16)],
        "read_indexer_cache_mxfp4_out": [(fp4, slots(), torch.zeros(5, 128))],
        "gather_indexer_cache_out": [
            (fp8, table, cu, values, scales),
            (fp8, table, cu, torch.zeros(75, 128), None),
        ],
        "topk": [
            (logits(), lengths(), K),
            (logits(), lengths()[:2], K, 2, torch.tensor([0, 3, 1, 2]), pages()[:2], 16, True),
        ],
        "topk_out": [
            (logits(), lengths(), K, new()),
            (
                logits(),
                lengths(),
                K,
                new(),
                new(),
                None,
                1,
                torch.tensor([0, 3, 1, 2]),
                pages(),
                16,
            ),
            (logits(), lengths(), K, new(), None, lengths()),
        ],
        "paged_logits": [(*full(),), (*full(2), 64, torch.float32)],
        "paged_logits_out": [(*scored(), torch.zeros(4, 64))],
        "ragged_logits": [
            windows(),
            (*windows(), torch.float16),
            (*windows(), torch.float32, True),
        ],
        "ragged_logits_out": [
            (*windows(), torch.zeros(4, 20)),
            (*windows(), torch.zeros(4, 20), True),
        ],
        "select": [(*scored(), K), (*scored(2), K, 64, torch.float32, pages(), 16, True)],
        "select_out": [
            (*scored(), K, new()),
            (*scored(), K, new(), new(), torch.zeros(4, 64), 64, torch.float32, pages(), 16),
        ],
        "block_maxima": [(*full(),), (*full(2), 32, 4, torch.float32)],
        "block_maxima_out": [
            (*scored(), torch.zeros(4, 8), None),
            (*scored(2), torch.zeros(4, 8), torch.zeros(4, 64)),
        ],
        "select_blocks": [(logits(), lengths(), K), (logits(), lengths()[:2], K, 4, 2)],
        "select_blocks_out": [
            (logits(), lengths(), K, new()),
            (logits(), lengths(), K, new(), lengths(), 4),
        ],
        "candidate_logits": [
            (*with_candidates(),),
            (*with_candidates(2), 32, 4, torch.float32),
        ],
        "candidate_logits_out": [
            (*with_candidates(), torch.zeros(4, 24), None),
            (*with_candidates(), torch.zeros(4, 24), lengths()),
        ],
        "candidate_logits_ragged": [
            windows_with_candidates(),
            (*windows_with_candidates(), 4, torch.float16),
        ],
        "candidate_logits_ragged_out": [
            (*windows_with_candidates(), torch.zeros(4, 24), None),
            (*windows_with_candidates(), torch.zeros(4, 24), lengths()),
        ],
        "candidate_select": [
            (*with_candidates(), K),
            (*with_candidates(2), K, 32, 4, torch.float32, pages(), 16),
        ],
        "candidate_select_out": [
            (*with_candidates(), K, new()),
            (*with_candidates(), K, new(), new(), lengths(), 64, 8, torch.float16, pages(), 16),
        ],
        "select_candidates": [
            (*of_candidates(), K),
            (logits(4, 12), *of_candidates()[1:], K, 4),
        ],
        "select_candidates_out": [
            (*of_candidates(), K, new()),
            (*of_candidates(), K, new(), new(), lengths(), 8, 1, pages(), 16),
        ],
    }


CASES = [(name, n) for name, calls in op_calls().items() for n in range(len(calls))]


def test_every_op_is_here() -> None:
    assert set(op_calls()) == set(torch_library.registered)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_opcheck(name: str, case: int) -> None:
    op = getattr(torch.ops.dsv4, name).default
    result = torch.library.opcheck(op, op_calls()[name][case])
    assert set(result.values()) == {"SUCCESS"}


def read(cache: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    return read_indexer_cache(cache, slot_mapping, dtype=torch.bfloat16) + 1


def read_mxfp4(cache: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    return read_indexer_cache_mxfp4(cache, slot_mapping) + 1


def read_out(cache: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    out = torch.empty(slot_mapping.shape[0], 128)
    read_indexer_cache(cache, slot_mapping, out=out)
    return out + 1


def gather_out(cache: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    table, cu = paged()
    out = torch.zeros(75, 128)
    gather_indexer_cache(cache, table, cu, dtype=torch.float32, out=out)
    return out + 1


def best(scores: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return topk(scores, columns, K, sort=True) + 1


def best_slots(scores: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    out, raw = torch.empty(4, K, dtype=torch.int32), torch.empty(4, K, dtype=torch.int32)
    counts = torch.empty(4, dtype=torch.int32)
    topk(
        scores, columns, K, page_table=pages(), page_size=16, out=out, out_raw=raw,
        out_counts=counts,
    )  # fmt: skip
    return torch.cat([out, raw, counts[:, None].expand(4, K)])


def score(*arguments: torch.Tensor) -> torch.Tensor:
    return paged_logits(*arguments, dtype=torch.float32) + 1


def score_out(*arguments: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(4, 64, dtype=torch.bfloat16)
    paged_logits(*arguments, out=out)
    return out + 1


def score_ragged(*arguments: torch.Tensor) -> torch.Tensor:
    return ragged_logits(*arguments) + 1


def score_ragged_out(*arguments: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(4, 20)
    ragged_logits(*arguments, out=out)
    return out + 1


def chosen(*arguments: torch.Tensor) -> torch.Tensor:
    return select(*arguments, K, sort=True) + 1


def chosen_slots(*arguments: torch.Tensor) -> torch.Tensor:
    raw = torch.empty(4, K, dtype=torch.int32)
    out = select(*arguments, K, page_table=arguments[4], out_raw=raw)
    return torch.cat([out, raw])


def block_scores(*arguments: torch.Tensor) -> torch.Tensor:
    return block_maxima(*arguments, dtype=torch.float32) + 1


def block_scores_out(*arguments: torch.Tensor) -> torch.Tensor:
    every = torch.zeros(4, 64, dtype=torch.bfloat16)
    out = torch.zeros(4, 8, dtype=torch.bfloat16)
    block_maxima(*arguments, out=out, logits=every)
    return torch.cat([out, every], dim=1)


def best_blocks(scores: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return select_blocks(scores, columns, K) + 1


def best_blocks_out(scores: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    counts = torch.empty(4, dtype=torch.int32)
    return select_blocks(scores, columns, K, out_counts=counts) + counts[:, None]


def score_candidates(*arguments: torch.Tensor) -> torch.Tensor:
    return candidate_logits(*arguments, dtype=torch.float32) + 1


def score_candidates_out(*arguments: torch.Tensor) -> torch.Tensor:
    count = torch.zeros(4, dtype=torch.int32)
    return candidate_logits(*arguments, out_lengths=count) + count[:, None]


def score_gathered(*arguments: torch.Tensor) -> torch.Tensor:
    return candidate_logits_ragged(*arguments) + 1


def score_gathered_out(*arguments: torch.Tensor) -> torch.Tensor:
    count = torch.zeros(4, dtype=torch.int32)
    return candidate_logits_ragged(*arguments, out_lengths=count) + count[:, None]


def best_of_candidates(*arguments: torch.Tensor) -> torch.Tensor:
    return candidate_select(*arguments, K) + 1


def best_of_candidates_out(*arguments: torch.Tensor) -> torch.Tensor:
    slots, counts = torch.empty(4, K, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    out = candidate_select(
        *arguments, K, page_table=pages(), page_size=16, out_slots=slots, out_counts=counts
    )
    return torch.cat([out, slots, counts[:, None].expand(4, K)])


def best_candidates(*arguments: torch.Tensor) -> torch.Tensor:
    return select_candidates(*arguments, K) + 1


def best_candidates_out(*arguments: torch.Tensor) -> torch.Tensor:
    slots, counts = torch.empty(4, K, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    out = select_candidates(
        *arguments, K, block_table=pages(), page_size=16, out_slots=slots, out_counts=counts
    )
    return torch.cat([out, slots, counts[:, None].expand(4, K)])


FUNCTIONS: list[tuple[Callable[..., torch.Tensor], Callable[[], tuple[torch.Tensor, ...]]]] = [
    (read, lambda: (fp8_cache(3), slots())),
    (read_mxfp4, lambda: (mxfp4_cache(3), slots())),
    (read_out, lambda: (fp8_cache(3), slots())),
    (gather_out, lambda: (fp8_cache(3), slots())),
    (best, lambda: (logits(), lengths())),
    (best_slots, lambda: (logits(), lengths())),
    (score, full),
    (score_out, scored),
    (score_ragged, windows),
    (score_ragged_out, windows),
    (chosen, scored),
    (chosen_slots, scored),
    (block_scores, full),
    (block_scores_out, scored),
    (best_blocks, lambda: (logits(), lengths())),
    (best_blocks_out, lambda: (logits(), lengths())),
    (score_candidates, with_candidates),
    (score_candidates_out, with_candidates),
    (score_gathered, windows_with_candidates),
    (score_gathered_out, windows_with_candidates),
    (best_of_candidates, with_candidates),
    (best_of_candidates_out, with_candidates),
    (best_candidates, of_candidates),
    (best_candidates_out, of_candidates),
]
NAMES = [function.__name__ for function, _ in FUNCTIONS]


@pytest.mark.parametrize(("function", "inputs"), FUNCTIONS, ids=NAMES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(
    function: Callable[..., torch.Tensor],
    inputs: Callable[[], tuple[torch.Tensor, ...]],
    dynamic: bool,
) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    assert torch.equal(compiled(*inputs()), function(*inputs()))
    assert len(graphs) == 1
    assert any("dsv4" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_of_the_reads(dtype: torch.dtype) -> None:
    for function, cache in ((read_indexer_cache, fp8_cache(3)),
                            (read_indexer_cache_mxfp4, mxfp4_cache(3))):  # fmt: skip
        real = function(cache, slots(), dtype=dtype)
        with FakeTensorMode() as mode:
            fake = function(mode.from_tensor(cache), mode.from_tensor(slots()), dtype=dtype)
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        meta = function(cache.to("meta"), slots().to("meta"), dtype=dtype)
        assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, dtype, "meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_of_topk(dtype: torch.dtype) -> None:
    real = topk(logits().to(dtype), lengths(), K)
    with FakeTensorMode() as mode:
        fake = topk(mode.from_tensor(logits().to(dtype)), mode.from_tensor(lengths()), K)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype) == ((4, K), torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fakes_of_the_logits(dtype: torch.dtype) -> None:
    """Shape, dtype and strides: 20 keys of bfloat16 have rows 24 apart."""
    for function, inputs in ((paged_logits, scored()), (ragged_logits, windows())):
        real = function(*inputs, dtype=dtype)
        with FakeTensorMode() as mode:
            fake = function(*map(mode.from_tensor, inputs), dtype=dtype)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, dtype, real.stride())
    indices = select(*scored(), K, dtype=dtype)
    with FakeTensorMode() as mode:
        fake = select(*map(mode.from_tensor, scored()), K, dtype=dtype)
    assert (fake.shape, fake.dtype) == (indices.shape, indices.dtype) == ((4, K), torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fakes_of_the_candidate_ops(dtype: torch.dtype) -> None:
    """Shape, dtype and strides: 9 blocks of bfloat16 have rows 16 apart."""
    for function, inputs in (
        (block_maxima, scored(1, (65, 30, 5, 9))),
        (candidate_logits, with_candidates()),
        (candidate_logits_ragged, windows_with_candidates()),
    ):
        real = function(*inputs, dtype=dtype, piece=7)
        with FakeTensorMode() as mode:
            fake = function(*map(mode.from_tensor, inputs), dtype=dtype, piece=7)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, dtype, real.stride())
        meta = function(*(x.to("meta") for x in inputs), dtype=dtype, piece=7)
        assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, dtype, "meta")
    for function, inputs in (
        (select_blocks, (logits().to(dtype), lengths())),
        (select_candidates, (of_candidates()[0].to(dtype), *of_candidates()[1:])),
        (candidate_select, with_candidates()),
    ):
        with FakeTensorMode() as mode:
            fake = function(*map(mode.from_tensor, inputs), K)
        assert (fake.shape, fake.dtype) == ((4, K), torch.int32)
    with FakeTensorMode() as mode:  # `out` is made if only the others are given
        inputs = tuple(map(mode.from_tensor, scored()))
        every = mode.from_tensor(torch.zeros(4, 64, dtype=dtype))
        fake = block_maxima(*inputs, logits=every)
    assert (fake.shape, fake.dtype) == ((4, 8), dtype)


class Sub(torch.Tensor):
    """A subclass without a dispatch of its own."""


@pytest.mark.parametrize(
    ("function", "inputs"),
    [pair for pair in FUNCTIONS if "block" in pair[0].__name__ or "candid" in pair[0].__name__],
    ids=[n for n in NAMES if "block" in n or "candid" in n],
)
def test_a_subclass_of_a_tensor_is_served(
    function: Callable[..., torch.Tensor], inputs: Callable[[], tuple[torch.Tensor, ...]]
) -> None:
    got = function(*(x.as_subclass(Sub) for x in inputs()))
    assert torch.equal(got.as_subclass(torch.Tensor), function(*inputs()))


class Seen(TorchDispatchMode):
    """Collects the ops that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("function", "inputs"), FUNCTIONS, ids=NAMES)
def test_a_dispatch_mode_sees_the_op(
    function: Callable[..., torch.Tensor], inputs: Callable[[], tuple[torch.Tensor, ...]]
) -> None:
    want = function(*inputs())
    arguments = inputs()
    with Seen() as seen:
        got = function(*arguments)
    assert torch.equal(got, want)
    assert sum(op.startswith("dsv4.") for op in seen.ops) == 1


@pytest.mark.parametrize(("function", "inputs"), FUNCTIONS, ids=NAMES)
def test_plain_tensors_go_around_the_dispatcher(
    function: Callable[..., torch.Tensor],
    inputs: Callable[[], tuple[torch.Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    want = function(*inputs())

    def refuse(op: str) -> Any:
        raise AssertionError(f"{op} went through torch.ops")

    monkeypatch.setattr(torch_library, "overload", refuse)
    assert torch.equal(function(*inputs()), want)
    with pytest.raises(AssertionError, match="went through"), Seen():
        function(*inputs())


def test_the_dispatcher_and_the_direct_road_agree() -> None:
    for name, function, arguments in (
        ("topk", topk, (logits(), lengths(), K)),
        ("read_indexer_cache", read_indexer_cache, (fp8_cache(3), slots())),
        ("paged_logits", paged_logits, full()),
        ("ragged_logits", ragged_logits, windows()),
        ("select", select, (*scored(), K)),
        ("block_maxima", block_maxima, full()),
        ("select_blocks", select_blocks, (logits(), lengths(), K)),
        ("candidate_logits", candidate_logits, with_candidates()),
        ("candidate_logits_ragged", candidate_logits_ragged, windows_with_candidates()),
        ("candidate_select", candidate_select, (*with_candidates(), K)),
        ("select_candidates", select_candidates, (*of_candidates(), K)),
    ):
        direct = function(*arguments)
        assert torch.equal(getattr(torch.ops.dsv4, name)(*arguments), direct)
