"""The behaviour of a call that an implementation cannot serve."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsv4_plugin.errors import UnmetError


def serve(
    call: Callable[[str], torch.Tensor], backend: str, unmet: str | None = None
) -> torch.Tensor:
    """Return ``call(backend)``.

    ``unmet`` says why the CUDA form cannot serve it. Then an explicit "cuda" must be refused with
    that reason, and "auto" must give the result with another implementation.
    """
    if backend == "cuda" and unmet is not None:
        with pytest.raises(UnmetError, match=unmet):
            call("cuda")
        return call("auto")
    return call(backend)
