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

from dsv4_plugin.ops import checks

__all__ = ["functional", "mutating", "register", "registered", "through_dispatcher"]

_LIBRARY = torch.library.Library("dsv4", "DEF")
registered: list[str] = []


def functional(op: str) -> Callable[..., Any]:
    """Return the ``torch.ops.dsv4`` overload of ``op`` that makes its output."""
    return getattr(torch.ops.dsv4, op).default


def mutating(op: str) -> Callable[..., Any]:
    """Return the ``torch.ops.dsv4`` overload of ``op`` that fills its outputs."""
    return getattr(torch.ops.dsv4, f"{op}_out").default


def through_dispatcher(*tensors: Any) -> bool:
    """Return whether a call on these arguments has to be seen by torch's dispatcher.

    Behind the dispatcher the answer is no: :func:`register` hands on plain tensors, also for a
    subclass of a tensor, which has no dispatch of its own.
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
    """Define ``torch.ops.dsv4.*``. Each file of ops registers its own functions at its end.

    The op calls the function with plain tensors, so the call does not come back here.

    Args:
        schema: of the op, its name first. Its arguments are parameters of ``function``, by name.
            The op leaves out a ``dtype`` of None.
        function: the public function. Its result counts for an op that makes a tensor.
        fake: takes the arguments that it needs, and makes the tensor. None: the op makes none.
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

    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY._register_fake(name, _checked(schema, make))
    registered.append(name)


def _plain(value: Any) -> Any:
    """Return a tensor of a subclass, which has no dispatch of its own, as a plain one."""
    if not isinstance(value, torch.Tensor) or type(value) in (torch.Tensor, torch.nn.Parameter):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(torch.Tensor)


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
