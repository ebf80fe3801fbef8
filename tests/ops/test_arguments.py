"""The rules for the arguments of every op, in its public function and as ``torch.ops.dsv4``.

Each test covers all ops, because a fault in one op was a fault in several each time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kits.inputs import mxfp4_cache
from kits.logits_cases import D, paged

import dsv4_plugin
from dsv4_plugin import gather_indexer_cache, ragged_logits, select, topk
from dsv4_plugin.cli.checks.inputs import fp8_cache
from dsv4_plugin.ops import torch_library

I32 = torch.int32
ROWS, COLUMNS, K = 4, 128, 8


def arguments(op: str) -> dict[str, Any]:
    """The arguments of a call that is served, all its tensors given, outputs too."""

    def copied(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(copied, value))
        return value.clone() if isinstance(value, torch.Tensor) else value

    return {name: copied(value) for name, value in drawn(op).items()}


@functools.cache
def drawn(op: str) -> dict[str, Any]:
    case = paged([128, 100, 5, 0], heads=2, pages=6)
    cache, table = fp8_cache(6), torch.tensor([[2, 0], [1, 5]], dtype=I32)
    pages = torch.arange(ROWS * 2, dtype=I32).view(ROWS, 2)
    chosen = {"out": torch.empty(ROWS, K, dtype=I32), "out_raw": torch.empty(ROWS, K, dtype=I32)}
    blocks = torch.tensor([[0, 3, 7], [1, 2, -1], [0, -1, -1], [-1, -1, -1]], dtype=I32)
    scored = {
        "q": case.q.view(torch.uint8), "cache": case.cache, "weights": case.weights,
        "lengths": case.lengths, "block_table": case.table,
    }  # fmt: skip
    return {
        "topk": {
            "logits": torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)),
            "lengths": torch.tensor([128, 100, 5, 0], dtype=I32), "k": K, "next_n": 1,
            "row_starts": torch.tensor([0, 3, 0, 0], dtype=I32), "page_table": pages,
            "page_size": 64, "out_counts": torch.empty(ROWS, dtype=I32), **chosen,
        },
        "read_indexer_cache": {
            "cache": cache, "slot_mapping": torch.tensor([3, -1, 64, 191]), "block_size": 64,
            "head_dim": 128, "out": torch.empty(4, 128),
        },
        "read_indexer_cache_mxfp4": {
            "cache": mxfp4_cache(6), "slot_mapping": torch.tensor([3, -1, 64, 191]),
            "block_size": 64, "head_dim": 128, "out": torch.empty(4, 128),
        },
        "gather_indexer_cache": {
            "cache": cache, "block_table": table, "cu_seq_lens": torch.tensor([0, 70, 75]),
            "block_size": 64, "head_dim": 128,
            "out": (torch.empty(75, 128, dtype=torch.uint8), torch.empty(75)),
        },
        "paged_logits": {**scored, "block_size": 64, "out": torch.empty(ROWS, COLUMNS)},
        "ragged_logits": {
            "q": scored["q"][:, 0], "k": case.cache[0, : 60 * D].reshape(60, D),
            "k_scale": torch.ones(60), "weights": case.weights,
            "row_starts": torch.tensor([0, 50, -3, 70], dtype=I32),
            "row_ends": torch.tensor([60, 130, 9, 80], dtype=I32), "out": torch.empty(ROWS, 90),
        },
        "select": {
            **scored, "k": K, "block_size": 64, "page_table": pages, "page_size": 64, **chosen,
            "logits": torch.empty(ROWS, COLUMNS),
        },
        "block_maxima": {
            **scored, "block_size": 64, "piece": 8, "out": torch.empty(ROWS, 16),
            "logits": torch.empty(ROWS, COLUMNS),
        },
        "select_blocks": {
            "maxima": torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(0)),
            "lengths": case.lengths, "k": K, "piece": 8, "next_n": 1,
            "out": chosen["out"], "out_counts": torch.empty(ROWS, dtype=I32),
        },
        "candidate_logits": {
            **scored, "candidates": blocks, "block_size": 64, "piece": 8,
            "out": torch.empty(ROWS, 24), "out_lengths": torch.empty(ROWS, dtype=I32),
        },
        "candidate_select": {
            **scored, "candidates": blocks, "k": K, "block_size": 64, "piece": 8,
            "page_table": pages, "page_size": 64, "out": chosen["out"],
            "out_slots": chosen["out_raw"], "out_counts": torch.empty(ROWS, dtype=I32),
        },
        "candidate_logits_ragged": {
            "q": scored["q"][:, 0], "k": case.cache[0, : 60 * D].reshape(60, D),
            "k_scale": torch.ones(60), "weights": case.weights, "candidates": blocks,
            "row_starts": torch.tensor([0, 30, -3, 0], dtype=I32),
            "row_ends": torch.tensor([60, 130, 9, 0], dtype=I32), "piece": 8,
            "out": torch.empty(ROWS, 24), "out_lengths": torch.empty(ROWS, dtype=I32),
        },
        "select_candidates": {
            "logits": torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(0)),
            "candidates": blocks, "lengths": case.lengths, "k": K, "piece": 8, "next_n": 1,
            "block_table": pages, "page_size": 64, "out": chosen["out"],
            "out_slots": chosen["out_raw"], "out_counts": torch.empty(ROWS, dtype=I32),
        },
    }[op]  # fmt: skip


OPS = ("topk", "read_indexer_cache", "read_indexer_cache_mxfp4", "gather_indexer_cache",
       "paged_logits", "ragged_logits", "select", "block_maxima", "select_blocks",
       "candidate_logits", "candidate_logits_ragged", "candidate_select",
       "select_candidates")  # fmt: skip
OUTPUTS = ("out", "out_raw", "out_counts", "out_lengths", "out_slots", "logits")
SIZES = ("k", "next_n", "page_size", "block_size", "head_dim", "piece")


def test_every_op_is_here() -> None:
    for op in OPS:
        public(op)  # some are registered when they are first asked for
    assert {name.removesuffix("_out") for name in torch_library.registered} == set(OPS)


def is_output(op: str, name: str) -> bool:
    return name in OUTPUTS and (name != "logits" or op in ("select", "block_maxima"))


def flat(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a call; the two of a tuple each by its name."""
    found = {}
    for name, value in given.items():
        parts = value if isinstance(value, tuple) else (value,)
        for at, part in enumerate(parts):
            if isinstance(part, torch.Tensor):
                found[name if len(parts) == 1 else f"{name}[{at}]"] = part
    return found


def change(given: dict[str, Any], name: str, value: torch.Tensor) -> dict[str, Any]:
    """The call with one of its tensors replaced."""
    if "[" not in name:
        return given | {name: value}
    name, at = name[:-3], int(name[-2])
    parts = list(given[name])
    parts[at] = value
    return given | {name: tuple(parts)}


def without(given: dict[str, Any]) -> dict[str, Any]:
    """The call that makes its own result."""
    kept = ("q", "k", "logits") if "weights" not in given else ("q", "k")
    return {n: v for n, v in given.items() if n not in OUTPUTS or n in kept}


def public(op: str) -> Callable[..., Any]:
    return getattr(dsv4_plugin, op)


def by_dispatcher(op: str) -> Callable[..., Any]:
    """``torch.ops.dsv4``'s form that fills outputs, with the arguments of the public function."""
    form = getattr(torch.ops.dsv4, f"{op}_out")

    def call(**given: Any) -> Any:
        if op == "gather_indexer_cache":
            given["values"], given["scales"] = given.pop("out")
        form(**given)

    return call


FORMS = (public, by_dispatcher)


def results(given: dict[str, Any], op: str) -> list[torch.Tensor]:
    return [t.clone() for n, t in flat(given).items() if is_output(op, n.partition("[")[0])]


def answer(op: str, call: Callable[..., Any]) -> list[torch.Tensor]:
    """What a call leaves in outputs of zeros; the scores of a selection are not of the answer."""
    given = arguments(op)
    for name, t in flat(given).items():
        if is_output(op, name.partition("[")[0]):
            t.zero_()
    call(**given)
    given.pop("logits" if op == "select" else "", None)
    return results(given, op)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(
        x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


@functools.cache
def served(op: str) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """The outputs that a plain call writes, and those that a call without outputs makes."""
    return answer(op, public(op)), made(op, arguments(op))


@pytest.mark.parametrize("op", OPS)
def test_both_forms_give_one_answer(op: str) -> None:
    assert same(served(op)[0], answer(op, by_dispatcher(op)))


# ---- Process-wide defaults of torch --------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def made(op: str, given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    got = public(op)(**without(given))
    return got if isinstance(got, tuple) else (got,)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_nothing(op: str, dtype: torch.dtype) -> None:
    """Engines set it to bfloat16 while they build a model."""
    want, made_before = served(op)
    given = arguments(op)
    with default_dtype(dtype):
        made_now = made(op, given)
        for name, t in flat(given).items():
            if is_output(op, name.partition("[")[0]):
                t.zero_()
        public(op)(**given)
    given.pop("logits" if op == "select" else "", None)
    assert same(results(given, op), want)
    assert [(t.dtype, t.shape) for t in made_now] == [(t.dtype, t.shape) for t in made_before]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("empty", [False, True])
def test_the_default_device_changes_nothing(op: str, empty: bool) -> None:
    """`meta` is the default while a loader builds a model; a cache may have no page yet."""
    given, want = arguments(op), arguments(op)
    for call in (given, want):
        if empty and "cache" in call:
            call["cache"] = call["cache"][:0]
            call["slot_mapping"] = torch.full((4,), -1) if "slot_mapping" in call else None
            call = {n: v for n, v in call.items() if v is not None}
        for name, t in flat(call).items():
            if is_output(op, name.partition("[")[0]):
                t.zero_()
    given, want = ({n: v for n, v in c.items() if v is not None} for c in (given, want))
    public(op)(**want)
    with torch.device("meta"):
        new = made(op, given)
        public(op)(**given)
    assert {t.device.type for t in new} == {"cpu"}
    for call in (given, want):
        call.pop("logits" if op == "select" else "", None)
    assert same(results(given, op), results(want, op))


# ---- Subclasses of a tensor ----------------------------------------------------------------------


class Mine(torch.Tensor):
    """A subclass without a dispatch of its own."""


class Weight(torch.nn.Parameter):
    """What engines keep weights in."""


def as_weight(t: torch.Tensor) -> torch.Tensor:
    return Weight(t, requires_grad=False)


EVERY_TENSOR = [(op, name) for op in OPS for name in flat(arguments(op))]


@pytest.mark.parametrize(("op", "name"), EVERY_TENSOR)
@pytest.mark.parametrize("wrap", [lambda t: t.as_subclass(Mine), as_weight], ids=["Mine", "Weight"])
def test_a_subclass_is_served_as_the_plain_tensor(
    op: str, name: str, wrap: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    want, want_made = served(op)

    def call(**given: Any) -> Any:
        return public(op)(**change(given, name, wrap(flat(given)[name])))

    assert same(answer(op, call), want)
    given = arguments(op)
    if not is_output(op, name.partition("[")[0]):
        new = made(op, change(given, name, wrap(flat(given)[name])))
        assert [(t.dtype, t.shape) for t in new] == [(t.dtype, t.shape) for t in want_made]
        if op not in (
            "paged_logits",
            "ragged_logits",
            "block_maxima",
        ):  # these leave columns as they were
            assert same([t.as_subclass(torch.Tensor) for t in new], list(want_made))


# ---- The meta device -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("op", "name"), EVERY_TENSOR)
def test_a_meta_tensor_among_others_is_refused(op: str, name: str, form: Callable) -> None:
    """A buffer that a loader left there: torch would answer with memory that was never written."""
    given = arguments(op)
    given = change(given, name, flat(given)[name].to("meta"))
    with pytest.raises(ValueError, match="must be on the device of .*meta"):
        form(op)(**given)


@pytest.mark.parametrize(("op", "name"), EVERY_TENSOR)
def test_a_meta_tensor_is_refused_where_the_result_is_made(op: str, name: str) -> None:
    given = arguments(op)
    if is_output(op, name.partition("[")[0]):
        return
    given = without(change(given, name, flat(given)[name].to("meta")))
    with pytest.raises(ValueError, match="must be on the device of .*meta"):
        public(op)(**given)


@pytest.mark.parametrize("op", OPS)
def test_all_on_meta_gives_a_shape(op: str) -> None:
    given = arguments(op)
    for name, t in flat(given).items():
        given = change(given, name, t.to("meta"))
    public(op)(**given)
    if op == "gather_indexer_cache":
        with pytest.raises(ValueError, match="out must be given on the meta device"):
            public(op)(**without(given))
        return
    real = made(op, arguments(op))
    assert [(t.shape, t.dtype, t.device.type) for t in made(op, given)] == [
        (t.shape, t.dtype, "meta") for t in real
    ]


# ---- Sizes ---------------------------------------------------------------------------------------

EVERY_SIZE = [
    (op, name)
    for op in OPS
    for name, value in arguments(op).items()
    if name in SIZES and isinstance(value, int)  # of ragged logits `k` are the keys
]


@pytest.mark.parametrize("value", [0, -1, -64, -(1 << 40)])
@pytest.mark.parametrize(("op", "name"), EVERY_SIZE)
def test_a_size_below_one_is_refused(op: str, name: str, value: int) -> None:
    """In every form: with outputs, without, through the dispatcher, and on shapes alone."""
    words = rf"{name} must be (at least 1|1 to \d+), got {value}"
    for on in ("cpu", "meta"):
        given = arguments(op)
        for each, t in flat(given).items():
            given = change(given, each, t.to(on))
        given[name] = value
        for form in FORMS:
            with pytest.raises(ValueError, match=words):
                form(op)(**given)
        with pytest.raises(ValueError, match=words):
            public(op)(**without(given))
        made_by = getattr(torch.ops.dsv4, op, None)
        if op != "gather_indexer_cache":  # it has no such form
            with pytest.raises(ValueError, match=words):
                made_by(**without(given))


@pytest.mark.parametrize("op", ["topk", "select", "select_candidates", "candidate_select"])
def test_a_size_that_is_too_large_is_refused(op: str) -> None:
    for name, value in (("k", 2049), ("page_size", 1 << 31), ("page_size", 1 << 40)):
        for form in FORMS:
            with pytest.raises(ValueError, match=rf"{name} must be 1 to \d+, got {value}"):
                form(op)(**(arguments(op) | {name: value}))


@pytest.mark.parametrize(
    "ends,words",
    [
        ([0, -5, -9], "must not decrease, got -5 after 0 at entry 1"),
        ([0, 10, 5], "must not decrease, got 5 after 10 at entry 2"),
        ([3, 10, 20], "must start at 0, got 3"),
        ([-1, 10, 20], "must start at 0, got -1"),
        ([0, 10, 1 << 62], f"must end at most at {(1 << 31) - 1}, got {1 << 62}"),
        ([0, 1 << 31, 1 << 31], "must end at most at"),
    ],
)
def test_sequence_ends_are_looked_at_before_memory_is_asked_for(ends: list, words: str) -> None:
    given = arguments("gather_indexer_cache") | {"cu_seq_lens": torch.tensor(ends)}
    with pytest.raises(ValueError, match=f"cu_seq_lens {words}"):
        gather_indexer_cache(**without(given))
    for form in FORMS:  # on a CPU that costs nothing, so it is looked at here too
        with pytest.raises(ValueError, match=f"cu_seq_lens {words}"):
            form("gather_indexer_cache")(**given)


def test_bad_outputs_of_a_gather() -> None:
    given = arguments("gather_indexer_cache")
    values, scales = given["out"]
    with pytest.raises(ValueError, match=r"out must be \(values, scales\), got 3 elements"):
        gather_indexer_cache(**(given | {"out": (values, scales, scales)}))
    with pytest.raises(TypeError, match=r"out\[1\] must be a torch.Tensor, got NoneType"):
        gather_indexer_cache(**(given | {"out": (values, None)}))
    odd = torch.empty(75 * 4 + 2, dtype=torch.uint8)[2:].view(75, 4)
    with pytest.raises(ValueError, match=r"out\[1\] must start at a multiple of 4 bytes"):
        gather_indexer_cache(**(given | {"out": (values, odd)}))


def test_the_chain_is_checked_before_it_computes() -> None:
    """The scores' buffer does not change if the selection is refused."""
    given = arguments("select")
    given["logits"].fill_(-77.0)
    for name, value in (("k", 0), ("page_size", -1), ("out_raw", given["out_raw"].long())):
        with pytest.raises((ValueError, TypeError), match=name):
            select(**(given | {name: value}))
    assert bool((given["logits"] == -77.0).all())


# ---- Memory that is shared -----------------------------------------------------------------------


def on_bytes_of(t: torch.Tensor, like: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """A tensor as ``like`` that begins on the memory of ``t``, however small that is."""
    step = like.element_size()
    room = torch.zeros(0, dtype=like.dtype)
    first = (t.data_ptr() - t.untyped_storage().data_ptr()) // step + offset
    room.set_(t.untyped_storage(), 0, (t.untyped_storage().nbytes() // step,))
    return room.as_strided(like.shape, like.stride(), first)


def grown(given: dict[str, Any]) -> dict[str, Any]:
    """The call with every tensor at the front of an allocation that is large enough for any."""
    for name, t in flat(given).items():
        held = torch.zeros(max(1 << 17, 2 * t.nbytes), dtype=torch.uint8)
        there = on_bytes_of(held, t)
        given = change(given, name, there.copy_(t))
    return given


def pairs() -> Iterator[tuple[str, str, str]]:
    for op in OPS:
        names = list(flat(arguments(op)))
        for at, name in enumerate(names):
            for other in (*names[:at], *names[at + 1 :]):
                if is_output(op, name.partition("[")[0]):
                    yield op, name, other


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("op", "name", "other"), list(pairs()))
def test_an_output_on_memory_of_another_tensor_is_refused(
    op: str, name: str, other: str, form: Callable
) -> None:
    given = grown(arguments(op))
    tensors = flat(given)
    shared = on_bytes_of(tensors[other], tensors[name])
    assert shared.data_ptr() == tensors[other].data_ptr()
    labels = {"logits": r"(logits|out)"} if op == "select" else {}
    a, b = (labels.get(n, n.replace("[", r"\[").replace("]", r"\]")) for n in (name, other))
    with pytest.raises(ValueError, match=rf"({a} must not share memory with {b}|{b}.*with {a}),"):
        form(op)(**change(given, name, shared))


@pytest.mark.parametrize("op", OPS)
def test_an_output_that_overlaps_itself_is_refused(op: str) -> None:
    for name, t in flat(arguments(op)).items():
        if not is_output(op, name.partition("[")[0]):
            continue
        one = torch.empty(t.shape[1:], dtype=t.dtype).expand(t.shape)
        near = torch.empty(t.numel() + 99, dtype=t.dtype).as_strided(t.shape, (1,) * t.dim())
        for bad in (one, near) if t.dim() > 1 else (one,):
            for form in FORMS:
                with pytest.raises(ValueError, match="overlap|contiguous|unit stride"):
                    form(op)(**change(arguments(op), name, bad))


def slices(offset: int, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Two outputs of one buffer, the second ``offset`` columns on."""
    wide = torch.empty(rows + 2, 5 * K, dtype=I32)
    return wide[1 : rows + 1, :K], wide[1 : rows + 1, offset : offset + K]


@pytest.mark.parametrize("op", ["topk", "select"])
def test_slices_of_one_buffer(op: str) -> None:
    """Interleaved tensors are separate; tensors with a common byte are not."""
    want, _ = served(op)
    for offset in (K, K + 1, 4 * K):
        given = arguments(op)
        given["out"], given["out_raw"] = slices(offset)
        public(op)(**given)
        given.pop("logits" if op == "select" else "", None)
        assert same([t.contiguous() for t in results(given, op)], want)
    for offset in (0, 1, K - 1):
        given = arguments(op)
        given["out"], given["out_raw"] = slices(offset)
        with pytest.raises(ValueError, match="out must not share memory with out_raw"):
            public(op)(**given)
    for shift, meets in ((-3 * K, False), (-K, False), (1 - K, True), (K, False)):
        wide = torch.empty(2 * ROWS, 4 * K, dtype=I32)
        given = arguments(op)
        given["out"] = wide[:ROWS, :K]  # rows 0 … 3, the other one two rows down
        given["out_raw"] = wide.view(-1)[8 * K + shift :].as_strided(
            (ROWS, K), (4 * K, 1), 8 * K + shift
        )
        if meets:
            with pytest.raises(ValueError, match="share memory"):
                public(op)(**given)
        else:
            public(op)(**given)


def test_strides_that_differ_are_compared_exactly() -> None:
    """Rows 20 and 24 columns apart in one buffer: they miss each other for a while, then meet."""
    buffer = torch.empty(400, dtype=I32)
    for rows, meets in ((3, False), (4, True)):
        given = arguments("topk")
        for name in ("lengths", "row_starts", "page_table", "logits"):
            given[name] = given[name][:rows]
        del given["out_counts"]
        given["out"] = buffer.as_strided((rows, K), (20, 1), 0)
        given["out_raw"] = buffer.as_strided((rows, K), (24, 1), 8)
        distinct = {int(x) for t in ("out", "out_raw") for x in _places(given[t])}
        assert (len(distinct) < 2 * rows * K) == meets
        if meets:
            with pytest.raises(ValueError, match="share memory"):
                topk(**given)
        else:
            topk(**given)


def _places(t: torch.Tensor) -> list[int]:
    rows, columns = t.shape
    return [t.storage_offset() + r * t.stride(0) + c for r in range(rows) for c in range(columns)]


def test_two_tensors_of_different_storages_can_share_memory() -> None:
    """As tensors from DLPack or numpy do: it is addresses that count."""
    import numpy as np

    held = np.zeros((ROWS, 2 * K), dtype=np.int32)
    given = arguments("topk")
    given["out"] = torch.from_numpy(held)[:, :K]
    given["out_raw"] = torch.from_numpy(held)[:, K - 1 : 2 * K - 1]
    with pytest.raises(ValueError, match="out must not share memory with out_raw"):
        topk(**given)
    given["out_raw"] = torch.from_numpy(held)[:, K:]
    topk(**given)


def test_inputs_may_share_memory_with_each_other() -> None:
    given = arguments("select")
    given["page_table"] = given["block_table"]
    select(**given)
    ends = torch.full((ROWS,), 9, dtype=I32)
    given = arguments("ragged_logits") | {"row_starts": ends, "row_ends": ends}
    ragged_logits(**given)
    logits = torch.randn(COLUMNS).expand(ROWS, COLUMNS)
    topk(**(arguments("topk") | {"logits": logits}))
