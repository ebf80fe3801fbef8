"""The candidates that a source of DeepSeek-V4.1 publishes, in the plugin's form and in SGLang's.

SGLang's backend keeps the object that a source returns and passes it to the consumers without
reading it. If the plugin has to leave a consumer to SGLang after all, that consumer finds in the
object what SGLang's own source would have published (``blocks``, ``decode_mask``). The object makes
them when the consumer asks for them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

__all__ = ["Published", "published"]


class Published:
    """The candidate blocks of every row.

    ``candidates`` is int32 ``[rows, K]``, ascending, -1 after the last; None if every block that a
    row sees is a candidate. ``lengths`` are the keys that each row sees, ``columns`` at most.
    ``rows_per_request``: only for a prefill. ``block_size``: keys in a block.
    """

    def __init__(
        self,
        candidates: torch.Tensor | None,
        lengths: torch.Tensor,
        columns: int,
        block_size: int,
        rows_per_request: list[int] | None = None,
    ) -> None:
        self.candidates, self.lengths, self.columns = candidates, lengths, columns
        self.block_size, self.rows_per_request = block_size, rows_per_request

    @functools.cached_property
    def blocks(self) -> torch.Tensor:
        """The candidates in the form of SGLang's ``BlockIds``."""
        if self.candidates is not None:
            return self.candidates
        return every_block(self.lengths, -(-self.columns // self.block_size), self.block_size)

    @functools.cached_property
    def decode_mask(self) -> torch.Tensor:
        """Bool ``[rows, columns]``: the keys of the candidates, by SGLang's own function."""
        from sglang.kernels.ops.attention.dsv4 import candidate_blocks

        mask: torch.Tensor = candidate_blocks.candidate_block_mask(
            self.blocks, self.columns, self.block_size
        )
        return mask

    def tail(self, rows_per_request: list[int]) -> Published:
        """Return the candidates of the last rows of every request; no host sync."""
        from sglang.srt.layers.attention.dsv4.v41_indexer import types

        assert self.rows_per_request is not None, "the source ran at decode"
        rows = types.get_tail_row_indices(
            full_rows_per_request=self.rows_per_request,
            tail_rows_per_request=rows_per_request,
            device=self.lengths.device,
        )
        candidates = None if self.candidates is None else self.candidates[rows]
        return published(
            candidates, self.lengths[rows], self.columns, self.block_size, rows_per_request
        )


def every_block(lengths: torch.Tensor, count: int, block_size: int) -> torch.Tensor:
    """Return int32 ``[rows, count]``: each block that a row sees, ascending, then -1."""
    blocks = torch.arange(count, dtype=torch.int32, device=lengths.device)
    return torch.where(blocks * block_size < lengths[:, None], blocks, -1)


@functools.cache
def _class() -> Any:
    """Return a subclass of :class:`Published` and SGLang's class, imported with the backend."""
    from sglang.srt.layers.attention.dsv4.v41_indexer import types

    return type("PublishedByDsv4", (Published, types.CandidateMetadata), {})


def published(*args: Any, **kwargs: Any) -> Published:
    """Return a :class:`Published` that SGLang accepts as its own class."""
    made: Published = _class()(*args, **kwargs)
    return made
