"""The compiled kernels of ``csrc/``, loaded through apache-tvm-ffi.

One shared library serves every torch, Python and CUDA 12/13 host, because it links to none of
them (``docs/packaging.md``). It is loaded when it is first needed and never compiled here.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

__all__ = ["CAPABILITIES", "LIBRARY", "missing", "topk"]

LIBRARY = Path(__file__).resolve().parent.parent / "_C.so"
CAPABILITIES = ((9, 0),)  # what csrc/build.py compiles for


@functools.lru_cache(maxsize=1)
def _module() -> tuple[Any, str | None]:
    if not LIBRARY.is_file():
        return None, (
            f"the compiled library {LIBRARY.name} is not in this installation (built without "
            "nvcc; see 'Install' in the README)"
        )
    try:
        import tvm_ffi

        return tvm_ffi.load_module(str(LIBRARY)), None
    except Exception as error:
        return None, f"the compiled library {LIBRARY.name} cannot be loaded ({error})"


def missing() -> str | None:
    """Return why the library cannot be used, or ``None`` if it can."""
    return _module()[1]


@functools.cache
def _function(name: str) -> Any:
    module, why = _module()
    if module is None:
        raise RuntimeError(f"dsv4: {why}")
    return module.get_function(name)


def topk(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    out_raw: torch.Tensor | None,
    row_starts: torch.Tensor | None,
    page_table: torch.Tensor | None,
    k: int,
    next_n: int,
    page_size: int,
    sort: bool,
    narrow: bool,
) -> None:
    """Select the ``k`` largest columns of every row; see :func:`dsv4_plugin.ops.topk`."""
    _function("dsv4_topk")(
        logits, lengths, out, out_raw, row_starts, page_table, k, next_n, page_size, sort, narrow
    )
