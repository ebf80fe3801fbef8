"""Slices of a prefill's rows, the gather, and how ranks agree: without an engine."""

from __future__ import annotations

import datetime
import random
import threading

import pytest
import torch

from dsv4_plugin.engines.shared import row_shard
from dsv4_plugin.engines.shared.row_shard import Group, Shard, agree, exchange, shard


def no_gather(piece: torch.Tensor) -> torch.Tensor:
    raise AssertionError("nothing is gathered here")


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_shard, "FEWEST_KEYS", 1)
    monkeypatch.setattr(row_shard, "KEYS_PER_INDEX", 0)


def keys_of(queries: list[int], lengths: list[int], ratio: int) -> list[int]:
    return [
        (n - q + row + 1) // ratio
        for q, n in zip(queries, lengths, strict=True)
        for row in range(q)
    ]


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_slices_cover_the_rows_and_have_about_as_many_keys(ranks: int, ratio: int) -> None:
    draw = random.Random(ranks * ratio)
    for _ in range(100):
        queries = [draw.randint(1, 60) for _ in range(draw.randint(1, 5))]
        lengths = [q + draw.choice((0, 0, 3, 700)) for q in queries]
        keys, first = keys_of(queries, lengths, ratio), draw.randint(0, 9)
        found = [
            shard(Group(rank, ranks, no_gather), queries, lengths, ratio, 512, first)
            for rank in range(ranks)
        ]
        if not sum(keys):
            assert found == [None] * ranks
            continue
        one = found[0]
        assert one is not None and {each.bounds for each in found if each} == {one.bounds}
        bounds = [row - first for row in one.bounds]
        assert bounds[0] == 0 and bounds[-1] == len(keys) and bounds == sorted(bounds)
        share = sum(keys) / ranks
        for rank, each in enumerate(found):
            assert each is not None and each.rows == slice(*one.bounds[rank : rank + 2])
            got = sum(keys[bounds[rank] : bounds[rank + 1]])
            assert abs(got - share) <= 2 * max(keys)


def test_numbers_of_the_host_may_be_tensors() -> None:
    group = Group(1, 2, no_gather)
    given = [4000, 8192], [40_000, 60_000]
    tensors = [torch.tensor(x, dtype=torch.int32) for x in given]
    assert shard(group, *given, 1, 512) == shard(group, *tensors, 1, 512) is not None
    with torch.device("meta"):
        assert shard(group, *given, 1, 512) == shard(group, *tensors, 1, 512) is not None


def test_a_small_prefill_is_not_cut() -> None:
    group, rows = Group(0, 2, no_gather), 2048
    at = row_shard.FEWEST_KEYS // rows + 4 * 512  # keys of a row, on average
    tokens = at + rows // 2
    assert shard(group, [rows], [tokens], 1, 512) is not None
    assert shard(group, [rows], [tokens - 16], 1, 512) is None
    assert shard(group, [rows], [tokens], 1, 1024) is None, "more is gathered"
    assert shard(group, [rows], [tokens], 4, 512) is None, "fewer keys"
    assert shard(group, [], [], 1, 512) is None


@pytest.mark.parametrize(
    "bounds", [(3, 5, 9, 10), (3, 3, 9, 10), (3, 10, 10, 10), (3, 3, 3, 10)],
    ids=["all have rows", "first has none", "first has all", "last has all"],
)  # fmt: skip
@pytest.mark.parametrize("width", [16, 20], ids=["whole rows", "rows of a wider buffer"])
def test_every_rank_gets_every_row(bounds: tuple[int, ...], width: int) -> None:
    ranks = len(bounds) - 1
    want = torch.arange(7 * 16, dtype=torch.int32).view(7, 16)
    barrier, pieces = threading.Barrier(ranks), [torch.empty(0)] * ranks
    buffers = [torch.full((9, width), -7, dtype=torch.int32) for _ in range(ranks)]

    def run(rank: int) -> None:
        def all_gather(piece: torch.Tensor) -> torch.Tensor:
            pieces[rank] = piece
            barrier.wait(10)
            return torch.cat(pieces)

        cut = Shard(Group(rank, ranks, all_gather), bounds)
        rows = buffers[rank][1:8, :16]
        own = slice(cut.rows.start - 3, cut.rows.stop - 3)
        rows[own] = want[own]
        exchange(cut, rows)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    longest = max(end - begin for begin, end in zip(bounds, bounds[1:], strict=False))
    for rank, buffer in enumerate(buffers):
        assert pieces[rank].shape == (longest, 16), "pieces of one length"
        assert torch.equal(buffer[1:8, :16], want)
        around = torch.cat((buffer[0], buffer[8], buffer[1:8, 16:].flatten()))
        assert bool((around == -7).all()), "nothing is written around the rows"


def test_rows_within_a_chunk() -> None:
    cut = Shard(Group(1, 3, no_gather), (10, 20, 30, 40))
    assert cut.every_row == slice(10, 40) and cut.rows == slice(20, 30)
    assert cut.within(slice(15, 25)) == slice(5, 10)
    assert cut.within(slice(22, 60)) == slice(0, 8)
    for none in (slice(10, 20), slice(30, 40)):
        found = cut.within(none)
        assert found.start == found.stop


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> torch.distributed.HashStore:
    made = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: made)
    return made


def test_ranks_agree(store: torch.distributed.HashStore) -> None:
    found: dict[int, list[str]] = {}

    def run(rank: int) -> None:
        found[rank] = agree((4, 5, 6), rank, datetime.timedelta(seconds=20))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {0: [], 1: [], 2: []}


def test_who_is_missing_is_named(store: torch.distributed.HashStore) -> None:
    second = datetime.timedelta(seconds=1)
    assert agree((4, 5, 6), 1, second) == [
        f"rank {n} has not said in 0:00:01 that it shards rows too" for n in (4, 6)
    ]


def test_another_version_cuts_rows_elsewhere_perhaps(
    store: torch.distributed.HashStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = datetime.timedelta(seconds=1)
    monkeypatch.setattr(row_shard, "__version__", "1.0")
    agree((0, 1), 0, second)
    monkeypatch.setattr(row_shard, "__version__", "1.1")
    assert agree((0, 1), 1, second) == ["ranks have other versions of dsv4: 1.0, 1.1"]


def test_without_a_process_group_nobody_can_agree() -> None:
    (why,) = agree((0, 1), 0)
    assert "no store in which ranks can agree" in why
