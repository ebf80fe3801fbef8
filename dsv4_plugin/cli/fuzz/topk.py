"""Random calls of the top-k: every form of it, all arguments at once.

Two oracles judge an answer: :func:`~dsv4_plugin.cli.checks.oracles.faults`, which needs no
reference, and the torch reference (where that is what was called, a stable sort instead). Page
tables, guard
zones around the scores and the outputs, and the inputs themselves are looked at too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dsv4_plugin.cli.checks.canary import Guarded
from dsv4_plugin.cli.checks.inputs import DISTRIBUTIONS, scores
from dsv4_plugin.cli.checks.oracles import Ranking, Wrong, check_selection, slots_of
from dsv4_plugin.cli.checks.replay import captured
from dsv4_plugin.cli.checks.topk_cases import CAPACITIES, DTYPES, EDGES, KS, ODD_KS, plateau
from dsv4_plugin.cli.fuzz.case import CaseError, RequestsCase, flag, number, numbers, one_of
from dsv4_plugin.ops.dispatch import Call, choose

__all__ = ["EACH_ROW", "FORMS", "TopkCase", "draw", "lengths_tensor", "run", "smaller"]

MOST_COLUMNS = 8_000_000
UNGUARDED = 1 << 28  # bytes; a larger span of scores has no guards
_POISON = {"nan": float("nan"), "inf": float("inf"), "low": float("-inf"), "big": 1e30}
FORMS = ("rows", "batch", "batch1", "two_d", "strided")
EACH_ROW = ("rows", "two_d", "strided")  # the forms with a length for every row
_LANES = 2  # side streams of a case with `streams`


@dataclass(frozen=True)
class TopkCase(RequestsCase):
    """One call of the top-k. Requests are drawn, ``keep`` leaves some of them."""

    op: ClassVar[str] = "topk"
    requests: int = number(1, 1, 1 << 20, "requests that are drawn")
    next_n: int = number(1, 1, 64, "rows of a request")
    keep: str = numbers(("",), "first and last request that are called with, a/b")
    columns: int = number(1024, 1, MOST_COLUMNS, "columns")
    k: int = number(512, 1, 2048, "k")
    dtype: str = one_of(tuple(DTYPES), "of the scores")
    kind: str = one_of(
        (*DISTRIBUTIONS, "mixed", "plateau"), "distribution; mixed: another for every row"
    )
    lengths: str = numbers(("full", "any"), "of the requests that are kept")
    form: str = one_of(FORMS, "shape of lengths")
    wide: int = flag("lengths and row starts are int64")
    starts: int = flag("row starts")
    pages: int = number(0, 0, 4096, "columns of a page; 0: no page table")
    table: int = number(0, 0, 64, "pages that the table is too short")
    per_row: int = flag("a page table row for every row, not every request")
    raw: int = flag("out_raw beside the page table")
    counts: int = flag("out_counts")
    sort: int = flag("sorted by value")
    stride: int = number(0, 0, 1 << 33, "elements from row to row; 0: columns")
    offset: int = number(0, 0, 4096, "elements before the first row")
    out: int = number(0, -1, 4096, "columns that out is wider; -1: no out is given")
    poison: str = one_of(("nan", "inf", "low", "big", "none"), "what lies outside of a window")
    graph: int = number(0, 0, 64, "replays of a CUDA graph with other scores and lengths")
    streams: int = flag("the same call on two streams at once")

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        if self.graph and self.streams:
            raise CaseError("graph and streams exclude each other")
        if self.raw and not self.pages:
            raise CaseError("raw needs pages")

    def simpler(self, rows: list[int]) -> Iterator[TopkCase]:
        """Yield simpler cases, the simplest first."""
        yield from self.fewer(rows, _requests(self, 0))
        plain: dict[str, Any] = {
            "graph": 0, "streams": 0, "pages": 0, "table": 0, "per_row": 0, "raw": 0, "counts": 0,
            "starts": 0, "sort": 0, "wide": 0, "form": "rows", "stride": 0, "offset": 0, "out": 0,
            "poison": "none", "next_n": 1, "backend": "auto",
        }  # fmt: skip
        for name, value in plain.items():
            if getattr(self, name) != value:
                more = {"raw": 0, "table": 0, "per_row": 0} if name == "pages" else {}
                yield self.but(**{name: value}, **more)
        for kind in ("all_equal", "ascending", "two_values", "normal"):
            if kind == self.kind:
                break
            yield self.but(kind=kind)
        if self.dtype != "float32":
            yield self.but(dtype="float32")
        listed = [] if self.lengths in ("full", "any") else self.lengths.split("/")
        longest = max((int(x) for x in listed), default=self.columns)
        if 0 < longest < self.columns:
            yield self.but(columns=longest)
        for k in smaller(self.k):
            yield self.but(k=k)
        for columns in smaller(self.columns):
            fit = "/".join(str(min(int(x), columns)) for x in listed) or self.lengths
            yield self.but(columns=columns, lengths=fit)
        if len(listed) == 1:
            for n in smaller(max(int(listed[0]), 0)):
                yield self.but(lengths=str(n))
        if self.graph > 1:
            yield self.but(graph=1)
        if self.seed > 1:
            yield self.but(seed=1)


def smaller(value: int) -> list[int]:
    """Return smaller positive numbers: a few small ones, parts of it, and a little less."""
    some = [1, 2, 3, 4, 8, *(value - value // part for part in (2, 4, 8, 32, 128)), value - 1]
    return sorted({n for n in some if 0 < n < value})


# ---- Drawing -------------------------------------------------------------------------------------


def draw(seed: int, device: str, backends: tuple[str, ...]) -> TopkCase:
    """Draw a case; on a GPU up to some millions of scores, elsewhere some ten thousand."""
    r = random.Random(f"topk {seed}")
    gpu = device == "cuda"
    most = 6_000_000 if gpu else 40_000
    if r.random() < 0.12:  # many short rows, as a prefill has them
        columns = int(2 ** r.uniform(0, 11 if gpu else 7))
        requests = r.choice((1000, 2048, 8192, 16_384) if gpu else (100, 300))
    else:
        columns = _columns(r, most)
        requests = r.choice((1, 2, 5, 8, 33, 67, 133, 300))
    next_n = r.choice((1, 1, 1, 2, 3, 5))
    requests = max(1, min(requests, most // columns // next_n))
    rows = requests * next_n
    dtype = r.choice(list(DTYPES))
    kinds = [*DISTRIBUTIONS, "mixed", "plateau"]
    case = TopkCase(
        seed=r.randint(0, (1 << 31) - 1),
        backend=r.choice([b for b in ("auto", *backends) if b != "triton"]),
        requests=requests,
        next_n=next_n,
        columns=columns,
        k=r.choice((*KS, *KS, *ODD_KS, r.randint(1, 2048))),
        dtype=dtype,
        kind=r.choice([x for x in kinds if rows <= 300 or x not in ("plateau", "mixed")]),
        lengths=r.choice(("full", "any", "any")),
        form=r.choice(FORMS),
        wide=r.randint(0, 1),
        starts=int(r.random() < 0.3),
        sort=int(r.random() < 0.4),
        offset=r.choice((0, 0, 1, 3, 7, 8)),
        out=r.choice((-1, 0, 0, 1, 5)),
        poison=r.choice(("nan", "inf", "low", "big", "none")),
    )
    if r.random() < 0.3:
        case = case.but(
            pages=r.choice((1, 7, 48, 64, 256)), table=r.choice((0, 0, 1)),
            per_row=r.randint(0, 1), raw=int(r.random() < 0.7),
        )  # fmt: skip
    stride = r.choice((0, 0, 0, 1, 8, 999, -1, -2))
    if stride > 0:
        case = case.but(stride=columns + stride)
    elif stride < 0 and rows > 1:
        if stride == -1:  # rows that share memory
            case = case.but(stride=max(1, columns // r.choice((2, 3, 100))))
        elif gpu and rows <= 3 and r.random() < 0.2:  # past what 32 bits count
            case = case.but(stride=(1 << 31) + 64)
    what = r.random()
    if what < 0.1:
        case = case.but(graph=r.choice((1, 2, 5)))
    elif what < 0.15:
        case = case.but(streams=1)
    return case.but(counts=int(r.random() < 0.4))


def _columns(r: random.Random, most: int) -> int:
    """Near a boundary as often as anywhere."""
    if r.random() < 0.5:
        near = [edge for edge in EDGES if edge < most]
        return max(1, min(most, r.choice(near) + r.randint(-40, 40)))
    return min(most, int(2 ** r.uniform(0, 18)))


def _requests(case: TopkCase, step: int) -> list[int]:
    """Lengths of the requests that are kept; ``step`` counts replays."""
    first, count = case.kept
    if case.lengths == "full":
        return [case.columns] * count
    if case.lengths != "any":
        return [int(x) for x in case.lengths.split("/")]
    r = random.Random(f"lengths {case.seed} {step}")
    columns, k = case.columns, case.k
    near = [x + r.randint(-5, 5) for x in EDGES if x <= columns] or [columns]
    drawn = [
        r.choice((columns, r.randint(-1, columns + 5), k, k + 1, r.choice(near), 2 * k, 0, -1))
        for _ in range(case.requests)
    ]
    return drawn[first : first + count]


def _draw_scores(case: TopkCase, step: int, device: str) -> torch.Tensor:
    """Draw the scores of the rows that are kept."""
    rows, columns, dtype = case.requests * case.next_n, case.columns, DTYPES[case.dtype]
    seed = case.seed + step
    if case.kind == "plateau":
        r = random.Random(f"plateau {seed}")
        counts = [
            min(columns, max(0, r.choice(CAPACITIES) + r.randint(-1, 1))) for _ in range(rows)
        ]
        drawn = plateau(counts, columns, dtype, device)
    elif case.kind == "mixed":
        drawn = torch.empty(rows, columns, dtype=dtype, device=device)
        for i, kind in enumerate(DISTRIBUTIONS):
            some = len(range(i, rows, len(DISTRIBUTIONS)))
            if some:
                part = scores(kind, some, columns, dtype, seed=seed + i, device=device)
                drawn[i :: len(DISTRIBUTIONS)] = part
    else:
        drawn = scores(case.kind, rows, columns, dtype, seed=seed, device=device)
    first, count = case.kept
    return drawn[first * case.next_n : (first + count) * case.next_n]


# ---- The tensors of a case -----------------------------------------------------------------------


def lengths_tensor(
    form: str, batch: int, next_n: int, dtype: torch.dtype, device: str
) -> torch.Tensor:
    """Make lengths of one of :data:`FORMS`, all zero."""
    rows = batch * next_n if form in EACH_ROW else batch
    room = torch.zeros(rows, 2, dtype=dtype, device=device)
    return {
        "rows": lambda: room[:, 0].clone(),
        "batch": lambda: room[:, 0].clone(),
        "batch1": lambda: room[:, :1].clone(),
        "two_d": lambda: room[:, 0].clone().view(batch, next_n),
        "strided": lambda: room[:, 0],
    }[form]()


class Problem:
    """The tensors of a case; :meth:`fill` gives those in place the content of a step."""

    def __init__(self, case: TopkCase, device: str) -> None:
        self.case, self.device = case, device
        self.batch, self.count = case.kept[1], case.kept[1] * case.next_n
        rows, columns, dtype = self.count, case.columns, DTYPES[case.dtype]
        stride = case.stride or columns
        self.shared = rows > 1 and stride < columns
        span = (rows - 1) * stride + columns
        self.guards: list[tuple[str, Guarded]] = []
        if span * dtype.itemsize > UNGUARDED:
            held = torch.empty(span + case.offset, dtype=dtype, device=device)
            self.logits = held.as_strided((rows, columns), (stride, 1), case.offset)
        elif self.shared:
            whole = self._guarded("the scores", 1, span, dtype, offset=case.offset)
            self.logits = whole.as_strided((rows, columns), (stride, 1), whole.storage_offset())
        else:
            self.logits = self._guarded(
                "the scores", rows, columns, dtype, stride=stride, offset=case.offset
            )
        index = torch.int64 if case.wide else torch.int32
        self.lengths = lengths_tensor(case.form, self.batch, case.next_n, index, device)
        self.per_row = torch.zeros(rows, dtype=torch.int64, device=device)
        self.starts = torch.zeros(rows, dtype=index, device=device) if case.starts else None
        self.table = None
        if case.pages:
            pages = max(0, -(-columns // case.pages) - case.table)
            self.table = self._guarded(
                "the page table", rows if case.per_row else self.batch, pages, torch.int32,
                stride=pages + 3,
            )  # fmt: skip
        self.fill(0)

    def _guarded(self, name: str, rows: int, columns: int, dtype: torch.dtype, **more: int) -> Any:
        held = Guarded(rows, columns, dtype, device=self.device, **more)
        self.guards.append((name, held))
        return held.inside

    def output(self, name: str = "out") -> torch.Tensor:
        """Make an output that is full of nonsense, with guards."""
        k = self.case.k
        out = self._guarded(name, self.count, k, torch.int32, stride=k + max(0, self.case.out))
        return out.fill_(0x7FFFFFF0)

    def counts(self) -> torch.Tensor:
        """Make an output of one count a row, full of nonsense, with guards."""
        held = self._guarded("out_counts", 1, self.count, torch.int32)
        return held.fill_(0x7FFFFFF0)[0]

    def fill(self, step: int) -> None:
        """Draw lengths, starts, pages and scores; windows of other steps are forgotten."""
        case, device = self.case, self.device
        lengths = torch.tensor(_requests(case, step), dtype=torch.int64, device=device)
        ahead = torch.arange(1 - case.next_n, 1, device=device)
        self.per_row.copy_((lengths[:, None] + ahead).reshape(-1))
        each = case.form in EACH_ROW
        self.lengths.copy_((self.per_row if each else lengths).view(self.lengths.shape))
        g = torch.Generator().manual_seed(case.seed + step)
        whole = case.requests * case.next_n
        first = case.kept[0]
        if self.starts is not None:
            drawn = torch.randint(-2, case.columns + 2, (whole,), generator=g)
            drawn[torch.rand(whole, generator=g) < 0.5] //= 8
            self.starts.copy_(drawn[first * case.next_n :][: self.count])
        if self.table is not None:
            rows = whole if case.per_row else case.requests
            at = first * case.next_n if case.per_row else first
            pages = torch.randint(-1, 10_000, (rows, self.table.shape[1]), generator=g).int()
            self.table.copy_(pages[at : at + self.table.shape[0]])
        if self.shared:
            stride = self.logits.stride(0)
            span = (self.count - 1) * stride + case.columns
            kind = "normal" if case.kind in ("mixed", "plateau") else case.kind
            flat = scores(kind, 1, span, self.logits.dtype, seed=case.seed + step, device=device)
            self.logits.as_strided((span,), (1,)).copy_(flat[0])
        else:
            self.logits.copy_(_draw_scores(case, step, device))
            if case.poison != "none":
                column = torch.arange(case.columns, device=device)
                start = torch.zeros_like(self.per_row) if self.starts is None else self.starts
                inside = (column >= start[:, None]) & (column < (start + self.per_row)[:, None])
                bad = torch.tensor(_POISON[case.poison]).to(self.logits.dtype)
                self.logits.masked_fill_(~inside, bad.to(device))

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that are not outputs."""
        case = self.case
        return {
            "next_n": case.next_n, "row_starts": self.starts, "page_table": self.table,
            "page_size": case.pages or 64, "sort": bool(case.sort),
        }  # fmt: skip

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the tensors that a call must leave as they are."""
        found = {"the scores": self.logits, "lengths": self.lengths}
        if self.starts is not None:
            found["row_starts"] = self.starts
        if self.table is not None:
            found["page_table"] = self.table
        return found


# ---- Running and checking ------------------------------------------------------------------------


def run(case: TopkCase, device: str, topk: Callable[..., torch.Tensor]) -> None:
    """Run a case with ``topk`` and raise :class:`Wrong` for what is not as promised."""
    problem = Problem(case, device)
    given = case.out >= 0 or case.graph or case.streams
    lanes = _LANES if case.streams else 1
    outs = [problem.output() if given else None for _ in range(lanes)]
    raws = [problem.output("out_raw") if case.raw else None for _ in range(lanes)]
    counts = [problem.counts() if case.counts else None for _ in range(lanes)]

    def call(lane: int = 0) -> torch.Tensor:
        return topk(
            problem.logits, problem.lengths, case.k, out=outs[lane], out_raw=raws[lane],
            out_counts=counts[lane], backend=case.backend, **problem.arguments(),
        )  # fmt: skip

    before = {name: _bits(x).clone() for name, x in problem.inputs().items() if _small(x)}
    if case.graph:
        for step, answer in _replays(case, problem, call):
            _check(problem, answer, raws[0], counts[0], f"replay {step}: ")
        before = {}
    elif case.streams:
        for _ in range(3):
            _on_two_streams(call, device)
        for lane, out in enumerate(outs):
            assert out is not None
            _check(problem, out, raws[lane], counts[lane], f"stream {lane}: ")
    else:
        _check(problem, call(), raws[0], counts[0], "")
    for name, bits in before.items():
        if not torch.equal(bits, _bits(problem.inputs()[name])):
            raise Wrong(f"{name} was written to")
    for name, held in problem.guards:
        fault = held.fault()
        if fault:
            raise Wrong(f"around {name}: {fault}")


def _small(x: torch.Tensor) -> bool:
    return x.numel() <= 1 << 23


def _bits(x: torch.Tensor) -> torch.Tensor:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(words)


def _replays(
    case: TopkCase, problem: Problem, call: Callable[[], torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the answer of every replay; without a GPU a replay is a call."""
    replay, answer = captured(call, problem.device)
    for step in range(case.graph):
        problem.fill(step)
        answer.fill_(0x7FFFFFF0)
        replay()
        yield step, answer


def _on_two_streams(call: Callable[[int], torch.Tensor], device: str) -> None:
    if device != "cuda":
        for lane in range(_LANES):
            call(lane)
        return
    now = torch.cuda.current_stream()
    streams = [torch.cuda.Stream() for _ in range(_LANES)]
    for lane, stream in enumerate(streams):
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            call(lane)
    for stream in streams:
        now.wait_stream(stream)


def _check(
    problem: Problem,
    out: torch.Tensor,
    raw: torch.Tensor | None,
    counts: torch.Tensor | None,
    context: str,
) -> None:
    case, logits = problem.case, problem.logits
    sort = bool(case.sort)
    if tuple(out.shape) != (problem.count, case.k) or out.dtype != torch.int32:
        raise Wrong(f"{context}the answer is {out.dtype} {tuple(out.shape)}")
    index = out if problem.table is None else raw
    if index is not None:
        try:
            check_selection(
                logits, problem.per_row, case.k, index, starts=problem.starts, sort=sort,
                ascending=True,
            )  # fmt: skip
        except Wrong as wrong:
            raise Wrong(f"{context}{wrong}", wrong.rows) from None
    if raw is not None and problem.table is not None:
        slots = slots_of(raw, problem.table, case.pages, case.next_n)
        _equal(out, slots, f"{context}a slot is not the page's")
    want = _reference(problem)
    if counts is not None:
        _equal(counts[:, None], (want >= 0).sum(1)[:, None], f"{context}a count is not the row's")
    if problem.table is not None:
        want = slots_of(want, problem.table, case.pages, case.next_n)
    got = out
    if not sort:  # what is wanted comes best first; the order was looked at above
        got, want = out.sort(1).values, want.sort(1).values
    _equal(got, want, f"{context}not what the reference selects")


def _reference(problem: Problem) -> torch.Tensor:
    """Return the indices by the torch reference; by a stable sort if that is what was called."""
    case = problem.case
    kind = Call("topk", problem.logits.device, problem.logits.dtype, case.k)
    if choose(kind, case.backend) == "torch":
        return Ranking(problem.logits, problem.per_row, starts=problem.starts).want(case.k)
    from dsv4_plugin import topk

    return topk(
        problem.logits, problem.lengths, case.k, next_n=case.next_n, row_starts=problem.starts,
        sort=True, backend="torch",
    )  # fmt: skip


def _equal(got: torch.Tensor, want: torch.Tensor, why: str) -> None:
    wrong = (got.long() != want.long()).any(1)
    if bool(wrong.any()):
        rows = wrong.nonzero().reshape(-1).tolist()
        raise Wrong(f"{why}, in {len(rows)} of {len(got)} rows, first {rows[0]}", rows)
