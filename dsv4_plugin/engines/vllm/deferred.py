"""A call for index logits that are not computed yet: what DeepSeek-V4.1's candidate layers get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv4_plugin.engines.shared.decision import Selection

__all__ = ["Deferred"]


@dataclass(slots=True)
class Deferred:
    """The arguments of the call, and what has become known since.

    Attributes:
        selection: how the layer selects.
        columns: of the logits that vLLM expects.
        q: FP8 queries, ``[batch, next_n, heads, 128]`` at decode, ``[rows, heads, 128]`` at
            prefill.
        keys: the FP8 cache at decode, the gathered values at prefill.
        scales: of the gathered keys at prefill, None at decode.
        weights: ``[rows, heads]``.
        lengths: the keys that each row sees, in a form that the plugin's ops take.
        table: the block table at decode, None at prefill.
        window: at prefill where each row's keys begin and end among the gathered ones.
        engine: computes vLLM's own logits.
        mask: masks logits as vLLM does for a consumer, once vLLM has asked for that; takes
            ``row_ks`` and ``row_ke`` for logits whose rows begin elsewhere than vLLM's.
        scores: the plugin's logits of every key, where they were computed.
        candidates: the candidate blocks of each row, ascending, where the plugin published them.
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
        """Whether the plugin has what it selects from."""
        return self.scores is not None or self.candidates is not None

    def engine_logits(self) -> torch.Tensor:
        """Compute vLLM's own logits, masked where vLLM would have masked them by now."""
        logits = self.engine()
        if self.mask is not None:
            self.mask(logits)
        return logits
