"""``torch.ops.dsv4.*``: schemas, fakes, and the bypass that keeps eager calls cheap.

A call through the dispatcher to a Python implementation costs some 2.5 µs on the host, a direct
call a tenth of that. So the public functions ask :func:`through_dispatcher` first: only a
compiler, a fake or functional tensor or an active dispatch mode goes through ``torch.ops``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin import checks

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


def functional(op: str) -> Callable[..., Any]:
    """Return the ``torch.ops.dsv4`` overload of ``op`` that makes its output."""
    return getattr(torch.ops.dsv4, _FUNCTIONAL.get(op, op)).default


def mutating(op: str) -> Callable[..., Any]:
    """Return the ``torch.ops.dsv4`` overload of ``op`` that fills its outputs."""
    return getattr(torch.ops.dsv4, _MUTATING.get(op, f"{op}_out")).default


def through_dispatcher(*tensors: Any) -> bool:
    """Return whether a call on these arguments has to be seen by torch's dispatcher.

    Only the public functions ask. What runs behind the dispatcher does not, so that a subclass of
    a tensor, which has no dispatch of its own, is served there and not sent round again.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
    ):
        return True
    for t in tensors:
        kind = type(t)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if t.is_meta:
                return True
        elif isinstance(t, torch.Tensor):
            return True
    return False


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
    if not isinstance(value, torch.Tensor) or type(value) in (torch.Tensor, torch.nn.Parameter):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(torch.Tensor)


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    _LIBRARY._register_fake(name, _checked(schema, fake))
    registered.append(name)


def _checked(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``fake`` behind the checks that shapes alone allow: sizes, and one device for all.

    A tensor on the meta device makes torch call the fake, whatever the others are on.
    """
    arguments = [(a.name, str(a.type)) for a in torch._C.parse_schema(f"dsv4::{schema}").arguments]
    owner = arguments[0][0]
    sizes = [name for name, kind in arguments if kind == "int"]

    @functools.wraps(fake)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = {name: value for (name, _), value in zip(arguments, args, strict=False)} | kwargs
        for name in sizes:
            if name in given:
                checks.size(name, given[name])
        device = given[owner].device
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.device != device:
                meta = device.type == "meta" or value.device.type == "meta"
                if meta or name != "slot_mapping":  # slots are copied to the cache's device
                    checks.on_device(name, value, device, owner)
        return fake(*args, **kwargs)

    return checked


# What runs behind the dispatcher.


def _reads(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what runs behind a read: the form that makes its output, and the one that fills it."""

    def functional(
        cache, slot_mapping, block_size=64, head_dim=128, dtype=None, backend=None
    ) -> torch.Tensor:
        from dsv4_plugin import ops

        dtype = dtype or torch.float32
        return ops.run_read(op, cache, slot_mapping, block_size, head_dim, dtype, None, backend)

    def mutating(cache, slot_mapping, out, block_size=64, head_dim=128, backend=None) -> None:
        from dsv4_plugin import ops

        ops.run_read(op, cache, slot_mapping, block_size, head_dim, out.dtype, out, backend)

    return functional, mutating


_read_indexer_cache, _read_indexer_cache_out = _reads("read")
_read_indexer_cache_mxfp4, _read_indexer_cache_mxfp4_out = _reads("read_mxfp4")


def _gather_indexer_cache_out(
    cache, block_table, cu_seq_lens, values, scales, block_size=64, head_dim=128, backend=None
) -> None:
    from dsv4_plugin import ops

    ops.run_gather(cache, block_table, cu_seq_lens, values, scales, block_size, head_dim, backend)


def _topk(
    logits, lengths, k, next_n=1, row_starts=None, page_table=None, page_size=64, sort=False,
    narrow=False, backend=None,
):  # fmt: skip
    from dsv4_plugin import ops

    return ops.run_topk(
        logits, lengths, k, next_n, row_starts, page_table, page_size, None, None, None, sort,
        narrow, backend,
    )  # fmt: skip


def _topk_out(
    logits, lengths, out, out_raw, row_starts, page_table, k, next_n=1, page_size=64, sort=False,
    narrow=False, backend=None, out_counts=None,
) -> None:  # fmt: skip
    from dsv4_plugin import ops

    ops.run_topk(
        logits, lengths, k, next_n, row_starts, page_table, page_size, out, out_raw, out_counts,
        sort, narrow, backend,
    )  # fmt: skip


def _paged_logits(q, cache, weights, lengths, block_table, block_size=64, dtype=None, backend=None):
    from dsv4_plugin import logits

    dtype = dtype or torch.bfloat16
    return logits.run_paged(
        q, cache, weights, lengths, block_table, block_size, dtype, None, backend
    )


def _paged_logits_out(
    q, cache, weights, lengths, block_table, out, block_size=64, backend=None
) -> None:
    from dsv4_plugin import logits

    logits.run_paged(q, cache, weights, lengths, block_table, block_size, out.dtype, out, backend)


def _ragged_logits(q, k, k_scale, weights, row_starts, row_ends, dtype=None, backend=None):
    from dsv4_plugin import logits

    dtype = dtype or torch.bfloat16
    return logits.run_ragged(q, k, k_scale, weights, row_starts, row_ends, dtype, None, backend)


def _ragged_logits_out(q, k, k_scale, weights, row_starts, row_ends, out, backend=None) -> None:
    from dsv4_plugin import logits

    logits.run_ragged(q, k, k_scale, weights, row_starts, row_ends, out.dtype, out, backend)


def _select(
    q, cache, weights, lengths, block_table, k, block_size=64, dtype=None, page_table=None,
    page_size=64, sort=False, backend=None,
):  # fmt: skip
    from dsv4_plugin import logits

    return logits.run_select(
        q, cache, weights, lengths, block_table, k, block_size, dtype or torch.bfloat16,
        page_table, page_size, None, None, sort, None, backend,
    )  # fmt: skip


def _select_out(
    q, cache, weights, lengths, block_table, out, out_raw, logits, page_table, k, block_size=64,
    dtype=None, page_size=64, sort=False, backend=None,
) -> None:  # fmt: skip
    from dsv4_plugin.logits import run_select

    run_select(
        q, cache, weights, lengths, block_table, k, block_size, dtype or torch.bfloat16,
        page_table, page_size, out, out_raw, sort, logits, backend,
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
