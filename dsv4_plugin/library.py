"""``torch.ops.dsv4.*``: schemas, fakes, and the bypass that keeps eager calls cheap.

A call through the dispatcher to a Python implementation costs some 2.5 µs on the host, a direct
call a tenth of that. So the public functions ask :func:`through_dispatcher` first: only a
compiler, a fake or functional tensor or an active dispatch mode goes through ``torch.ops``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["functional", "mutating", "register", "registered", "through_dispatcher"]

_SCHEMAS = (
    "read_indexer_cache(Tensor cache, Tensor slot_mapping, int block_size=64, int head_dim=128, "
    "ScalarType? dtype=None, str? backend=None) -> Tensor",
    "read_indexer_cache_out(Tensor cache, Tensor slot_mapping, Tensor(a!) out, int block_size=64, "
    "int head_dim=128, str? backend=None) -> ()",
    "read_indexer_cache_mxfp4(Tensor cache, Tensor slot_mapping, int block_size=64, "
    "int head_dim=128, ScalarType? dtype=None, str? backend=None) -> Tensor",
    "read_indexer_cache_mxfp4_out(Tensor cache, Tensor slot_mapping, Tensor(a!) out, "
    "int block_size=64, int head_dim=128, str? backend=None) -> ()",
    "gather_indexer_cache_out(Tensor cache, Tensor block_table, Tensor cu_seq_lens, "
    "Tensor(a!) values, Tensor(b!)? scales, int block_size=64, int head_dim=128, "
    "str? backend=None) -> ()",
    "topk(Tensor logits, Tensor lengths, int k, int next_n=1, Tensor? row_starts=None, "
    "Tensor? page_table=None, int page_size=64, bool sort=False, bool narrow=False, "
    "str? backend=None) -> Tensor",
    "topk_out(Tensor logits, Tensor lengths, Tensor(a!) out, Tensor(b!)? out_raw, "
    "Tensor? row_starts, Tensor? page_table, int k, int next_n=1, int page_size=64, "
    "bool sort=False, bool narrow=False, str? backend=None, Tensor(c!)? out_counts=None) -> ()",
    "paged_logits(Tensor q, Tensor cache, Tensor weights, Tensor lengths, Tensor block_table, "
    "int block_size=64, ScalarType? dtype=None, str? backend=None) -> Tensor",
    "paged_logits_out(Tensor q, Tensor cache, Tensor weights, Tensor lengths, Tensor block_table, "
    "Tensor(a!) out, int block_size=64, str? backend=None) -> ()",
    "ragged_logits(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor row_starts, "
    "Tensor row_ends, ScalarType? dtype=None, str? backend=None) -> Tensor",
    "ragged_logits_out(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor row_starts, "
    "Tensor row_ends, Tensor(a!) out, str? backend=None) -> ()",
    "select(Tensor q, Tensor cache, Tensor weights, Tensor lengths, Tensor block_table, int k, "
    "int block_size=64, ScalarType? dtype=None, Tensor? page_table=None, int page_size=64, "
    "bool sort=False, str? backend=None) -> Tensor",
    "select_out(Tensor q, Tensor cache, Tensor weights, Tensor lengths, Tensor block_table, "
    "Tensor(a!) out, Tensor(b!)? out_raw, Tensor(c!)? logits, Tensor? page_table, int k, "
    "int block_size=64, ScalarType? dtype=None, int page_size=64, bool sort=False, "
    "str? backend=None) -> ()",
)
_FUNCTIONAL = {
    "read": "read_indexer_cache",
    "read_mxfp4": "read_indexer_cache_mxfp4",
    "topk": "topk",
    "paged_logits": "paged_logits",
    "ragged_logits": "ragged_logits",
    "select": "select",
}
_MUTATING = {
    "read": "read_indexer_cache_out",
    "read_mxfp4": "read_indexer_cache_mxfp4_out",
    "gather": "gather_indexer_cache_out",
    "topk": "topk_out",
    "paged_logits": "paged_logits_out",
    "ragged_logits": "ragged_logits_out",
    "select": "select_out",
}
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def functional(op: str) -> Callable[..., Any]:
    """Return the ``torch.ops.dsv4`` overload of ``op`` that makes its output."""
    return getattr(torch.ops.dsv4, _FUNCTIONAL.get(op, op)).default


def mutating(op: str) -> Callable[..., Any]:
    """Return the ``torch.ops.dsv4`` overload of ``op`` that fills its outputs."""
    return getattr(torch.ops.dsv4, _MUTATING.get(op, f"{op}_out")).default


def through_dispatcher(*tensors: Any) -> bool:
    """Return whether a call on these arguments has to be seen by torch's dispatcher."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or any(
            isinstance(t, torch.Tensor) and (type(t) not in _PLAIN or t.device.type == "meta")
            for t in tensors
        )
    )


def register(
    schema: str, function: Callable[..., Any], fake: Callable[..., Any] | None = None
) -> None:
    """Define ``torch.ops.dsv4.*``, whose arguments are parameters of a public function by name.

    The function is called with plain tensors, and so does not come back here.

    Args:
        schema: of the op, its name first; a ``dtype`` of None leaves it to ``function``.
        function: the public function; what it returns counts for an op that makes a tensor.
        fake: takes those arguments that it needs, and makes the tensor; None: the op makes none.
    """
    parsed = torch._C.parse_schema(f"dsv4::{schema}")
    names = [argument.name for argument in parsed.arguments]

    def by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        named = dict(zip(names, args, strict=False)) | kwargs
        return {name: x for name, x in named.items() if name != "dtype" or x is not None}

    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(**{name: _plain(x) for name, x in by_name(args, kwargs).items()})
        return result if parsed.returns else None

    def make(*args: Any, **kwargs: Any) -> Any:
        return fake(**by_name(args, kwargs)) if fake else None

    _define(schema, run, make)


def _plain(value: Any) -> Any:
    """Return a tensor of a subclass, which has no dispatch of its own, as a plain one."""
    if not isinstance(value, torch.Tensor) or type(value) in _PLAIN:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(torch.Tensor)


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    _LIBRARY._register_fake(name, fake)
    registered.append(name)


# The implementations run below the dispatcher, on plain tensors; no mode is active there, so the
# public functions take their direct road.


def _reads(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what runs behind a read: the form that makes its output, and the one that fills it."""

    def functional(
        cache, slot_mapping, block_size=64, head_dim=128, dtype=None, backend=None
    ) -> torch.Tensor:
        from dsv4_plugin import ops

        return getattr(ops, name)(
            cache, slot_mapping, block_size=block_size, head_dim=head_dim,
            dtype=dtype or torch.float32, backend=backend,
        )  # fmt: skip

    def mutating(cache, slot_mapping, out, block_size=64, head_dim=128, backend=None) -> None:
        from dsv4_plugin import ops

        getattr(ops, name)(
            cache, slot_mapping, block_size=block_size, head_dim=head_dim, out=out, backend=backend
        )

    return functional, mutating


_read_indexer_cache, _read_indexer_cache_out = _reads("read_indexer_cache")
_read_indexer_cache_mxfp4, _read_indexer_cache_mxfp4_out = _reads("read_indexer_cache_mxfp4")


def _gather_indexer_cache_out(
    cache, block_table, cu_seq_lens, values, scales, block_size=64, head_dim=128, backend=None
) -> None:
    from dsv4_plugin import ops

    ops.gather_into(cache, block_table, cu_seq_lens, values, scales, block_size, head_dim, backend)


def _topk(
    logits, lengths, k, next_n=1, row_starts=None, page_table=None, page_size=64, sort=False,
    narrow=False, backend=None,
):  # fmt: skip
    from dsv4_plugin import ops

    return ops.topk(
        logits, lengths, k, next_n=next_n, row_starts=row_starts, page_table=page_table,
        page_size=page_size, sort=sort, narrow=narrow, backend=backend,
    )  # fmt: skip


def _topk_out(
    logits, lengths, out, out_raw, row_starts, page_table, k, next_n=1, page_size=64, sort=False,
    narrow=False, backend=None, out_counts=None,
) -> None:  # fmt: skip
    from dsv4_plugin import ops

    ops.topk(
        logits, lengths, k, next_n=next_n, row_starts=row_starts, page_table=page_table,
        page_size=page_size, out=out, out_raw=out_raw, out_counts=out_counts, sort=sort,
        narrow=narrow, backend=backend,
    )  # fmt: skip


def _paged_logits(q, cache, weights, lengths, block_table, block_size=64, dtype=None, backend=None):
    from dsv4_plugin import logits

    return logits.paged_logits(
        q, cache, weights, lengths, block_table,
        block_size=block_size, dtype=dtype or torch.bfloat16, backend=backend,
    )  # fmt: skip


def _paged_logits_out(
    q, cache, weights, lengths, block_table, out, block_size=64, backend=None
) -> None:
    from dsv4_plugin import logits

    logits.paged_logits(
        q, cache, weights, lengths, block_table, block_size=block_size, out=out, backend=backend
    )


def _ragged_logits(q, k, k_scale, weights, row_starts, row_ends, dtype=None, backend=None):
    from dsv4_plugin import logits

    return logits.ragged_logits(
        q, k, k_scale, weights, row_starts, row_ends,
        dtype=dtype or torch.bfloat16, backend=backend,
    )  # fmt: skip


def _ragged_logits_out(q, k, k_scale, weights, row_starts, row_ends, out, backend=None) -> None:
    from dsv4_plugin import logits

    logits.ragged_logits(q, k, k_scale, weights, row_starts, row_ends, out=out, backend=backend)


def _select(
    q, cache, weights, lengths, block_table, k, block_size=64, dtype=None, page_table=None,
    page_size=64, sort=False, backend=None,
):  # fmt: skip
    from dsv4_plugin import logits

    return logits.select(
        q, cache, weights, lengths, block_table, k, block_size=block_size,
        dtype=dtype or torch.bfloat16, page_table=page_table, page_size=page_size, sort=sort,
        backend=backend,
    )  # fmt: skip


def _select_out(
    q, cache, weights, lengths, block_table, out, out_raw, logits, page_table, k, block_size=64,
    dtype=None, page_size=64, sort=False, backend=None,
) -> None:  # fmt: skip
    from dsv4_plugin.logits import select

    select(
        q, cache, weights, lengths, block_table, k, block_size=block_size,
        dtype=dtype or torch.bfloat16, page_table=page_table, page_size=page_size, out=out,
        out_raw=out_raw, sort=sort, logits=logits, backend=backend,
    )  # fmt: skip


def _fake_read_indexer_cache(
    cache, slot_mapping, block_size=64, head_dim=128, dtype=None, backend=None
):
    shape = (slot_mapping.shape[0], head_dim)
    return torch.empty(shape, dtype=dtype or torch.float32, device=cache.device)


_fake_read_indexer_cache_mxfp4 = _fake_read_indexer_cache


def _fake_topk(
    logits, lengths, k, next_n=1, row_starts=None, page_table=None, page_size=64, sort=False,
    narrow=False, backend=None,
):  # fmt: skip
    return torch.empty(logits.shape[0], k, dtype=torch.int32, device=logits.device)


def _rows(q: torch.Tensor) -> int:
    return q.shape[0] * (q.shape[1] if q.dim() == 4 else 1)


def _fake_paged_logits(
    q, cache, weights, lengths, block_table, block_size=64, dtype=None, backend=None
):
    from dsv4_plugin.logits import new_logits

    columns = block_table.shape[1] * block_size
    return new_logits(_rows(q), columns, dtype or torch.bfloat16, q.device)


def _fake_ragged_logits(q, k, k_scale, weights, row_starts, row_ends, dtype=None, backend=None):
    from dsv4_plugin.logits import new_logits

    return new_logits(q.shape[0], k.shape[0], dtype or torch.bfloat16, q.device)


def _fake_select(
    q, cache, weights, lengths, block_table, k, block_size=64, dtype=None, page_table=None,
    page_size=64, sort=False, backend=None,
):  # fmt: skip
    return torch.empty(_rows(q), k, dtype=torch.int32, device=q.device)


def _fake_nothing(*args: Any, **kwargs: Any) -> None:
    return None


_LIBRARY = torch.library.Library("dsv4", "DEF")
registered: list[str] = []
for _schema in _SCHEMAS:
    _name = _schema.partition("(")[0]
    _define(_schema, globals()[f"_{_name}"], globals().get(f"_fake_{_name}", _fake_nothing))
