"""The rows of an indexer prefill, sharded among the ranks of a tensor-parallel group.

Without sharding every rank scores and selects all rows. Here each rank scores and selects one slice
of them, and one gather of int32 indices for each layer brings all rows to all ranks. One rank
computes a whole row, so nothing is merged, and the answer is that of a single rank.

Ranks that disagree would hang or mix their rows. This excludes it:

* The slices, and whether a prefill is sharded at all, come from lengths that the scheduler gave
  to every rank. Nothing is read from the device.
* Every rank takes part in every gather, with an empty slice too, in the order of the layers.
* The plugin catches no error between slices and gather. If a kernel of the plugin fails on one
  rank, the engine's kernel selects the same slice there, and then that rank comes to the gather.
* At the start each rank tells the others that it shards, and waits for them (:func:`agree`).
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_plugin import log
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.version import __version__

__all__ = ["FEWEST_KEYS", "SETTING", "Group", "Shard", "agree", "exchange", "join", "say", "shard"]

SETTING = "DSV4_SHARD_PREFILL=1"
# A prefill is sharded if its rows together see at least FEWEST_KEYS keys, and KEYS_PER_INDEX more
# for each index that is gathered. Both are estimates and were not measured on two GPUs: 2,048 rows
# of 32,768 keys take 1.0 ms (benchmarks/results/h200_logits.json, h200_topk_prefill.json), so 2^25
# keys take 0.5 ms. Two ranks save half of it. A gather is expected to take less than 0.1 ms.
FEWEST_KEYS = 1 << 25
KEYS_PER_INDEX = 4
_PATIENCE = datetime.timedelta(minutes=5)


@dataclass(frozen=True)
class Group:
    """The engine's tensor-parallel group: this rank, and its gather of equal pieces.

    ``all_gather`` takes ``[rows, k]`` and returns ``[ranks · rows, k]``, in the order of the ranks.
    """

    rank: int
    ranks: int
    all_gather: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shard:
    """Which rank has which rows: rank ``r`` has those from ``bounds[r]`` to ``bounds[r + 1]``."""

    group: Group
    bounds: tuple[int, ...]

    @property
    def rows(self) -> slice:
        """The rows of this rank."""
        return slice(*self.bounds[self.group.rank : self.group.rank + 2])

    @property
    def every_row(self) -> slice:
        """The rows of all ranks."""
        return slice(self.bounds[0], self.bounds[-1])

    def within(self, rows: slice) -> slice:
        """Return which of ``rows`` are this rank's, counted from the first of ``rows``."""
        begin = max(rows.start, self.rows.start)
        end = max(begin, min(rows.stop, self.rows.stop))
        return slice(begin - rows.start, end - rows.start)


def shard(
    group: Group, queries: Any, lengths: Any, ratio: int, k: int, first: int = 0
) -> Shard | None:
    """Cut the rows of a prefill into slices with about the same number of scored keys each.

    Returns None if the prefill is too small. A row of a request sees the keys of all tokens up to
    its own, one key for ``ratio`` tokens. Slices may be empty.

    Args:
        group: the ranks.
        queries: rows of each request, in row order; numbers or a tensor on the host.
        lengths: tokens of each request, its rows included; likewise.
        ratio: tokens for each key.
        k: indices of a row.
        first: the number of the first row.
    """
    rows_of, tokens = (
        torch.as_tensor(x, dtype=torch.int64, device="cpu") for x in (queries, lengths)
    )
    rows = int(rows_of.sum())
    seen = torch.arange(1, rows + 1, device="cpu") + torch.repeat_interleave(
        tokens - rows_of.cumsum(0), rows_of, output_size=rows
    )
    keys = (seen // ratio).cumsum(0)
    if not rows or int(keys[-1]) < FEWEST_KEYS + KEYS_PER_INDEX * k * rows:
        return None
    shares = torch.arange(1, group.ranks, device="cpu") * keys[-1] // group.ranks
    ends = torch.searchsorted(keys, shares, right=True).tolist()
    return Shard(group, tuple(first + row for row in (0, *ends, rows)))


def exchange(shard: Shard, rows: torch.Tensor) -> None:
    """Fill in the rows of all other ranks; ``rows``, int32 ``[every row, k]``, has this rank's.

    Each rank sends a piece as long as the longest slice, so one gather of equal pieces is enough.
    """
    first, bounds, group = shard.bounds[0], shard.bounds, shard.group
    sizes = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    own = rows[shard.rows.start - first : shard.rows.stop - first]
    piece = rows.new_empty(max(sizes), rows.shape[1])
    piece[: len(own)].copy_(own)
    pieces = group.all_gather(piece).unflatten(0, (group.ranks, -1))
    for rank, (begin, size) in enumerate(zip(bounds, sizes, strict=False)):
        if rank != group.rank and size:
            rows[begin - first : begin - first + size].copy_(pieces[rank, :size])


def agree(
    members: Sequence[int], rank: int, patience: datetime.timedelta | None = None
) -> list[str]:
    """Tell the ranks of a group that this one shards; returns why not all of them do.

    The ranks speak through torch's store and not through the group: a rank that does not shard
    would not come to a collective of the plugin, and that collective must not meet one of the
    engine's.

    Args:
        members: the global ranks of the group, in the group's order.
        rank: this rank's place among them.
        patience: how long this rank waits for the others; five minutes if it is None.
    """
    try:
        store: Any = torch.distributed.distributed_c10d._get_default_store()
    except Exception as error:  # no process group, or a torch without this function
        return [f"torch has no store in which ranks can agree ({type(error).__name__}: {error})"]
    keys = [f"dsv4/shard_prefill/{'-'.join(map(str, members))}/{n}" for n in range(len(members))]
    store.set(keys[rank], __version__)
    patience = patience or _PATIENCE
    try:
        store.wait(keys, patience)
    except Exception:
        silent = [n for n, key in zip(members, keys, strict=True) if not store.check([key])]
        return [f"rank {n} has not said in {patience} that it shards rows too" for n in silent]
    others = sorted({store.get(key).decode() for key in keys})
    return [] if len(others) == 1 else [f"ranks have other versions of dsv4: {', '.join(others)}"]


def join(found: Any) -> Group:
    """Return the engine's tensor-parallel group ``found``, once its ranks have agreed to shard.

    Raises:
        UnmetError: they have not.
    """
    why = agree(found.ranks, found.rank_in_group)
    if why:
        raise UnmetError(SETTING, why)
    return Group(found.rank_in_group, found.world_size, lambda piece: found.all_gather(piece, 0))


def say(engine: str, group: Group) -> None:
    """Say once in the log that the rows of prefills are sharded."""
    log.once(
        logging.INFO,
        f"dsv4 shards the rows of prefills in {engine} among {group.ranks} tensor-parallel ranks; "
        f"this one is rank {group.rank}",
    )
