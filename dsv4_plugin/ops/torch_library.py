"""The registration of every op as ``torch.ops.dsv4.*``, and the direct call that avoids it.

A public op is a plain function with the decorator :func:`op`. The decorator reads the signature and
makes the rest: the schemas, the fakes, the support for ``torch.compile``, and the choice between
the dispatcher and a direct call. A call of a Python implementation through the dispatcher costs
some 2.5 µs on the host, a direct call a tenth of that. So a call goes through ``torch.ops`` only if
a compiler, a fake or functional tensor, or an active dispatch mode needs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import NoneType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from dsv4_plugin.ops import checks

__all__ = ["op", "overload", "registered", "through_dispatcher"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_LIBRARY = torch.library.Library("dsv4", "DEF")
registered: list[str] = []

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack

# annotation → type in a schema
_TYPES = {
    "torch.Tensor": "Tensor",
    "torch.Tensor | None": "Tensor?",
    "torch.dtype": "ScalarType",
    "str | None": "str?",
    "int": "int",
    "bool": "bool",
}
# The types of most arguments that are no tensors; for other types the slower check runs.
_NO_TENSORS = frozenset({NoneType, int, bool, str, torch.dtype})


def op(
    new: Callable[..., Tensor] | None, outputs: tuple[str, ...] = ("out",), name: str = ""
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make a function a public op, registered in two forms as ``torch.ops.dsv4``.

    ``<name>`` takes the function's parameters without the outputs and makes its result.
    ``<name>_out`` fills outputs. It takes the parameters without a default, then the outputs, then
    the other parameters. The function itself always gets plain tensors.

    Args:
        new: makes the first output from the shapes of the arguments. It takes the function's
            arguments by name, and those that it does not need in ``**_``. None: no form makes the
            result.
        outputs: the parameters that the op writes. The first is the op's result.
        name: of the op, if it differs from the name of the function.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        called = name or function.__name__
        parameters = inspect.signature(function).parameters.values()
        in_order = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        given = {p.name: p.default for p in parameters if p.default is not p.empty}
        inputs = [p for p in parameters if p.name not in outputs]
        if new is not None:
            make = new
            _register(called, [*map(_input, inputs)], function, lambda **x: make(**{**given, **x}))
        first = [_input(p) for p in inputs if p.name not in given]
        then = [_input(p) for p in inputs if p.name in given]
        written = [
            f"Tensor({chr(ord('a') + i)}!)" + (f" {o}" if i == 0 else f"? {o}=None")
            for i, o in enumerate(outputs)
        ]
        _register(f"{called}_out", [*first, *written, *then], function)

        @wraps(function)
        def public(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not through_dispatcher(args, kwargs):
                return function(*args, **kwargs)
            named: dict[str, Any] = {
                **given,
                **dict(zip(in_order[: len(args)], args, strict=True)),
                **kwargs,
            }
            if all(named[output] is None for output in outputs):
                return overload(called)(**{n: x for n, x in named.items() if n not in outputs})
            if new is not None and named[outputs[0]] is None:
                named[outputs[0]] = new(**named)
            overload(f"{called}_out")(**named)
            return named[outputs[0]]

        return public

    return decorate


def _input(parameter: inspect.Parameter) -> str:
    """Return a parameter in the syntax of a schema."""
    text = f"{_TYPES[str(parameter.annotation)]} {parameter.name}"
    if parameter.default is parameter.empty:
        return text
    return f"{text}={str(parameter.default).removeprefix('torch.')}"


def overload(name: str) -> Callable[..., Any]:
    """Return an op of ``torch.ops.dsv4``."""
    return getattr(torch.ops.dsv4, name).default


def through_dispatcher(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether torch's dispatcher must see a call with these arguments."""
    if is_compiling() or _dispatch_modes() or _function_modes():
        return True
    for values in (args, kwargs.values()):
        for value in values:
            kind = type(value)
            if kind is Tensor or kind is Parameter:
                if value.is_meta:
                    return True
            elif kind not in _NO_TENSORS and isinstance(value, Tensor):
                return True
    return False


def _register(
    name: str,
    arguments: list[str],
    function: Callable[..., Any],
    new: Callable[..., Tensor] | None = None,
) -> None:
    """Define ``torch.ops.dsv4.<name>``; without ``new`` it returns nothing."""
    names = [argument.split()[1].partition("=")[0] for argument in arguments]
    sizes = [n for n, argument in zip(names, arguments, strict=True) if argument[:4] == "int "]

    def by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(names, args, strict=False)) | kwargs

    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(**{n: _plain(value) for n, value in by_name(args, kwargs).items()})
        return None if new is None else result

    def fake(*args: Any, **kwargs: Any) -> Any:
        named = by_name(args, kwargs)
        for n in sizes:
            if n in named:
                checks.size(n, named[n])
        _check_devices(names[0], named)
        return None if new is None else new(**named)

    _LIBRARY.define(f"{name}({', '.join(arguments)}) -> {'()' if new is None else 'Tensor'}")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY._register_fake(name, fake)
    registered.append(name)


def _plain(value: Any) -> Any:
    """Return a tensor of a subclass without a dispatch of its own as a plain tensor."""
    if not isinstance(value, Tensor) or type(value) in (Tensor, Parameter):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


def _check_devices(owner: str, given: dict[str, Any]) -> None:
    """Check that all tensors are on one device; torch calls the fake if any of them is on meta."""
    device = given[owner].device
    for name, value in given.items():
        if isinstance(value, Tensor) and value.device != device:
            meta = device.type == "meta" or value.device.type == "meta"
            if meta or name != "slot_mapping":  # slots are copied to the cache's device
                checks.on_device(name, value, device, owner)
