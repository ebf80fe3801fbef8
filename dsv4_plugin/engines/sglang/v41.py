"""DeepSeek-V4.1's index layers: the plugin before the objects that SGLang's two factories return.

SGLang's attention backend asks a factory for the pair that serves the source and its consumers
(prefill and decode), another for what serves the plain layers, and calls their methods once a
layer. The plugin keeps what it gets, and stands before it: a call is the plugin's
(:mod:`.v41_calls`), or SGLang's own with the arguments as they came. Attributes that the plugin
does not have are those of SGLang's object.

It is decided when the backend is built, once for the source and its consumers together, so that a
consumer finds what it needs. Where one of them has to be left to SGLang after all, what the
plugin's source has published serves SGLang's consumer too (:mod:`.v41_published`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin.engines.sglang import policy, v41_calls
from dsv4_plugin.engines.sglang.v41_calls import Call, Layers
from dsv4_plugin.engines.sglang.v41_published import Published
from dsv4_plugin.engines.shared import logits, shadow
from dsv4_plugin.engines.shared.decision import Selection
from dsv4_plugin.engines.shared.fallback import serve

__all__ = ["Candidates", "Full", "make_candidates", "make_full"]


def make_candidates(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make SGLang's pair for the source and the consumers, and stand before it where decided."""
    made = original(*args, **kwargs)
    held = kwargs.get("candidate_topk_blocks", 0)
    if not (_is_v41(kwargs) and held and isinstance(made, tuple) and len(made) == 2):
        return made
    layers = Layers(kwargs["token_to_kv_pool"], kwargs["req_to_token"], held)
    piece = kwargs.get("candidate_block_size", 0)
    unfit = [why for engine in made for why in _unfit(engine, "DenseBlocksBackend")]
    unfit += v41_calls.unfit(held, piece)
    decided = functools.partial(policy.for_v41, "candidates", layers.device, tuple(unfit))
    if decided() is None:
        return made
    prefill, decode = (Candidates(engine, layers, decided) for engine in made)
    return prefill, decode


def make_full(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make what serves SGLang's plain layers, and stand before it where decided."""
    made = original(*args, **kwargs)
    if not _is_v41(kwargs):
        return made
    layers = Layers(kwargs["token_to_kv_pool"], kwargs["req_to_token"])
    unfit = tuple(_unfit(made, "FullTopKIndexer"))
    decided = functools.partial(policy.for_v41, "full", layers.device, unfit)
    return made if decided() is None else Full(made, layers, decided)


def _is_v41(given: dict[str, Any]) -> bool:
    """Whether a backend is built for DeepSeek-V4.1, which alone has compress ratios 1 and 2."""
    ratios = getattr(given.get("token_to_kv_pool"), "present_ratios", ())
    return isinstance(given.get("req_to_token"), torch.Tensor) and bool({1, 2} & set(ratios))


def _unfit(engine: Any, name: str) -> list[str]:
    """Return why what SGLang has made is not what the plugin knows."""
    if type(engine).__name__ != name:
        return [f"SGLang has a {type(engine).__name__} here, not a {name}"]
    return [
        f"SGLang has DeepGEMM's FP4 logits here ({flag})"
        for flag in ("use_deep_gemm_prefill", "use_deep_gemm_decode")
        if getattr(engine, flag, False)
    ]


class _Before:
    """The plugin before one of SGLang's objects, whose attributes it has besides its own."""

    def __init__(
        self, engine: Any, layers: Layers, decided: Callable[[], Selection | None]
    ) -> None:
        self._engine, self._layers, self._decided = engine, layers, decided

    def __getattr__(self, name: str) -> Any:
        if name == "_engine":  # not there yet
            raise AttributeError(name)
        return getattr(self._engine, name)

    def _serve(
        self,
        kind: str,
        inputs: Any,
        read: Callable[[Selection, Layers, Any], Call],
        plugin: Callable[[Any], Any],
        engine: Callable[[Any], Any],
        fit: bool = True,
    ) -> Any:
        """Return what ``plugin`` makes of a call, or ``engine`` of its inputs."""
        rows, made = len(inputs.positions), []
        selection = self._decided() if fit and rows else None
        call = None
        if selection is not None:
            try:
                call = read(selection, self._layers, inputs)
            except Exception as error:
                logits.failed(error)
                selection = None

        def watch() -> None:
            which = "out_page_indices" if read is v41_calls.decode else "out_raw_indices"

            def by_engine(scratch: torch.Tensor) -> None:
                structs: Any = importlib.import_module("msgspec").structs  # as SGLang's inputs are
                other = {"out_page_indices": None} if which == "out_raw_indices" else {}
                engine(structs.replace(inputs, **{**other, which: scratch}))

            shadow.watch(kind, getattr(inputs, which), by_engine)

        serve(
            kind, selection, torch.bfloat16, lambda _: made.append(plugin(call)),
            lambda: made.append(engine(inputs)), watch, rows,
        )  # fmt: skip
        return made[-1]


class Candidates(_Before):
    """Before the object that serves the source and the consumers."""

    def publish_decode(self, inputs: Any) -> Any:
        """Select for the source at decode; returns what its consumers get."""
        engine = self._engine.publish_decode
        return self._serve("v41.source", inputs, v41_calls.decode, Call.source, engine)

    def publish_prefill(self, inputs: Any) -> Any:
        """Select for the source at prefill; returns what its consumers get."""
        engine = self._engine.publish_prefill
        return self._serve("v41.source", inputs, v41_calls.prefill, Call.source, engine)

    def consume_decode(self, inputs: Any, published: Any) -> None:
        """Select for a consumer at decode."""
        self._consume(inputs, published, v41_calls.decode, self._engine.consume_decode)

    def consume_prefill(self, inputs: Any, published: Any) -> None:
        """Select for a consumer at prefill."""
        self._consume(inputs, published, v41_calls.prefill, self._engine.consume_prefill)

    def _consume(self, inputs: Any, published: Any, read: Any, engine: Any) -> None:
        self._serve(
            "v41.consumer", inputs, read, lambda call: call.consumer(published),
            lambda given: engine(given, published), fit=isinstance(published, Published),
        )  # fmt: skip


class Full(_Before):
    """Before the object that serves the plain layers."""

    def topk_decode(self, inputs: Any) -> None:
        """Select for a plain layer at decode."""
        self._serve("v41.plain", inputs, v41_calls.decode, Call.plain, self._engine.topk_decode)

    def topk_prefill(self, inputs: Any) -> None:
        """Select for a plain layer at prefill."""
        self._serve("v41.plain", inputs, v41_calls.prefill, Call.plain, self._engine.topk_prefill)
