"""DeepSeek-V4.1's index layers: the plugin before the objects that SGLang's two factories return.

SGLang's attention backend asks one factory for the pair of objects that serves the source and its
consumers (prefill and decode), and another for the object that serves the plain layers. It calls
their methods once for each layer. The plugin keeps SGLang's object and puts its own before it. The
plugin serves a call (:mod:`.v41_calls`), or SGLang's object serves it with the original arguments.
Attributes that the plugin does not have are read from SGLang's object.

The plugin decides when the backend is built, once for the source and its consumers together, so
that a consumer finds what it needs. If the plugin has to leave a consumer to SGLang after all,
SGLang's consumer reads what the plugin's source has published (:mod:`.v41_published`).
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
    """Make SGLang's pair for source and consumers; put the plugin before it if so decided."""
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
    """Make SGLang's object for the plain layers; put the plugin before it if so decided."""
    made = original(*args, **kwargs)
    if not _is_v41(kwargs):
        return made
    layers = Layers(kwargs["token_to_kv_pool"], kwargs["req_to_token"])
    unfit = tuple(_unfit(made, "FullTopKIndexer"))
    decided = functools.partial(policy.for_v41, "full", layers.device, unfit)
    return made if decided() is None else Full(made, layers, decided)


def _is_v41(given: dict[str, Any]) -> bool:
    """Whether a backend is built for DeepSeek-V4.1; only this model has compress ratios 1 and 2."""
    ratios = getattr(given.get("token_to_kv_pool"), "present_ratios", ())
    return isinstance(given.get("req_to_token"), torch.Tensor) and bool({1, 2} & set(ratios))


def _unfit(engine: Any, name: str) -> list[str]:
    """Return why the plugin does not know the object that SGLang has made."""
    if type(engine).__name__ != name:
        return [f"SGLang has a {type(engine).__name__} here, not a {name}"]
    return [
        f"SGLang has DeepGEMM's FP4 logits here ({flag})"
        for flag in ("use_deep_gemm_prefill", "use_deep_gemm_decode")
        if getattr(engine, flag, False)
    ]


class _Before:
    """The plugin's object before one of SGLang's; it also has the attributes of that object."""

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
        """Return the result of ``plugin`` for a call, or of ``engine`` for its inputs."""
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
    """Stands before the object that serves the source and the consumers."""

    def publish_decode(self, inputs: Any) -> Any:
        """Select for the source at decode; return the candidates for its consumers."""
        engine = self._engine.publish_decode
        return self._serve("v41.source", inputs, v41_calls.decode, Call.source, engine)

    def publish_prefill(self, inputs: Any) -> Any:
        """Select for the source at prefill; return the candidates for its consumers."""
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
    """Stands before the object that serves the plain layers."""

    def topk_decode(self, inputs: Any) -> None:
        """Select for a plain layer at decode."""
        self._serve("v41.plain", inputs, v41_calls.decode, Call.plain, self._engine.topk_decode)

    def topk_prefill(self, inputs: Any) -> None:
        """Select for a plain layer at prefill."""
        self._serve("v41.plain", inputs, v41_calls.prefill, Call.plain, self._engine.topk_prefill)
