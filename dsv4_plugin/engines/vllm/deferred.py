"""Calls of DeepSeek-V4.1's candidate layers that wait until the plugin knows what is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv4_plugin.engines.shared.decision import Selection

__all__ = ["Deferred", "Gather"]


@dataclass(slots=True)
class Gather:
    """The gather of a prefill chunk's keys, which runs when code reads the keys.

    Later chunks of the same requests read them too. ``cache`` has the keys, ``table`` the pages
    of each request, ``begins`` the first gathered key of each request.
    """

    run: Callable[[], None] | None
    cache: torch.Tensor
    table: torch.Tensor
    begins: torch.Tensor

    def __call__(self) -> None:
        """Gather the keys unless they are gathered already."""
        run, self.run = self.run, None
        if run is not None:
            run()

    def tables(self, starts: torch.Tensor, columns: int) -> torch.Tensor:
        """Return the pages of each row, which begins at ``starts`` and has at most ``columns``."""
        table = self.table[:, : -(-columns // self.cache.shape[1])]
        if len(table) == 1:
            return table.expand(len(starts), -1)
        request = torch.searchsorted(self.begins, starts, right=True) - 1
        return table[request.clamp(0, len(table) - 1)]


@dataclass(slots=True)
class Deferred:
    """The arguments of the call, and what later calls add.

    Attributes:
        selection: how the layer selects.
        columns: the columns of the logits that vLLM expects.
        q: FP8 queries, ``[batch, next_n, heads, 128]`` at decode, ``[rows, heads, 128]`` at
            prefill.
        keys: the FP8 cache at decode; the gathered values at prefill, after ``gather`` has run.
        scales: the scales of the gathered keys at prefill, None at decode.
        weights: ``[rows, heads]``.
        lengths: the keys that each row sees, in a form that the plugin's ops take.
        table: the block table at decode, None at prefill.
        window: at prefill, the begin and end of each row's keys among the gathered ones.
        gather: the gather of these keys; None if the engine has run its own.
        engine: computes vLLM's own logits.
        mask: masks logits as vLLM does for a consumer, set when vLLM asks for the mask; takes
            ``row_ks`` and ``row_ke`` for logits whose rows begin elsewhere than vLLM's.
        scores: the plugin's logits of every key, if they were computed.
        candidates: the candidate blocks of each row, ascending, if the plugin published them.
    """

    selection: Selection
    columns: int
    q: torch.Tensor
    keys: torch.Tensor
    scales: torch.Tensor | None
    weights: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor | None
    window: tuple[torch.Tensor, torch.Tensor] | None
    gather: Gather | None
    engine: Callable[[], torch.Tensor]
    mask: Callable[..., None] | None = None
    scores: torch.Tensor | None = None
    candidates: torch.Tensor | None = None

    @property
    def next_n(self) -> int:
        """Rows of a request."""
        return 1 if self.table is None else self.q.shape[1]

    @property
    def ready(self) -> bool:
        """Whether the plugin has the scores or the candidates to select from."""
        return self.scores is not None or self.candidates is not None

    def gathered(self) -> None:
        """Make sure that the keys are gathered."""
        if self.gather is not None:
            self.gather()

    def engine_logits(self) -> torch.Tensor:
        """Compute vLLM's own logits, masked if vLLM has already asked for the mask."""
        self.gathered()
        logits = self.engine()
        if self.mask is not None:
            self.mask(logits)
        return logits
