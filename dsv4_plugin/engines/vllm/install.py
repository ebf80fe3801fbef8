"""The places in vLLM that can be changed: how each is recognised, what is put there, and why.

Recognised by signature and source, never by version. What is not recognised stays upstream's, with
one line in the log. The table in ``docs/vllm.md`` says the same for readers.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
from typing import Any

import torch

from dsv4_plugin import log
from dsv4_plugin.engines.shared import plan, shadow
from dsv4_plugin.engines.shared.deep_gemm import has_logits_dtype
from dsv4_plugin.engines.shared.patches import Ledger, Patch
from dsv4_plugin.engines.shared.source import Missing
from dsv4_plugin.engines.vllm import fill, policy, probe, slots, wrappers
from dsv4_plugin.state import Seam, state

__all__ = [
    "NAMES", "indexer", "install", "intact", "reach_fill", "reach_slots", "takes_logits_dtype",
    "uninstall",
]  # fmt: skip

TOPK = "vllm.model_executor.layers.indexer_topk"
DEEP_GEMM = "vllm.utils.deep_gemm"
OPS = "vllm._custom_ops"
PLANNER = "vllm.v1.attention.backends.mla.indexer"
NAMES = (
    "guard", "topk.decode", "topk.prefill", "topk.slots", "topk.fill", "logits", "gather", "budget",
)  # fmt: skip

_ledger = Ledger()
_by_seam: dict[str, list[Patch]] = {}
_indexer: Any = None


def indexer() -> Any:
    """Return vLLM's indexer module as it was patched, or None."""
    return _indexer


def install(module: Any) -> None:
    """Look for every seam in vLLM's indexer module and its neighbours, and patch what is found."""
    global _indexer
    if _indexer is module:
        log.debug(f"{state.host}: {module.__name__} is patched already")
        return
    uninstall()
    _indexer = module
    vllm = sys.modules.get("vllm")
    state.host = f"vLLM {getattr(vllm, '__version__', 'of unknown version')}"
    for name, patch in (
        ("guard", _guard),
        ("topk.decode", _decode_topk),
        ("topk.prefill", _prefill_topk),
        ("topk.slots", _slots),
        ("topk.fill", _fill),
        ("logits", _logits),
        ("gather", _gather),
        ("budget", _budget),
    ):
        before = len(_ledger.patches)
        try:
            where, why = patch(module), None
        except _NotFound as error:
            where, why = None, str(error)
        except Exception as error:  # a host of a shape nobody thought of is one without the seam
            where, why = None, f"could not be patched ({type(error).__name__}: {error})"
        _by_seam[name] = _ledger.patches[before:]
        state.found(Seam(name, where, why or "no layer was built yet"))
    missing = [f"{s.name} ({s.why})" for s in state.seams.values() if s.where is None]
    if missing:
        log.once(logging.INFO, f"{state.host}: upstream's stays at {'; '.join(missing)}")


def uninstall() -> None:
    """Put every attribute back and forget what was seen."""
    global _indexer
    _indexer = None
    _ledger.restore(lambda patch: getattr(patch.replacement, "resolved", None))
    _by_seam.clear()
    policy.forget()
    slots.forget()
    plan.decide(plan.INERT)
    shadow.forget()
    state.reset()


def intact(name: str) -> bool:
    """Whether the patches of a seam are there and nobody has replaced them since."""
    patches = _by_seam.get(name)
    return bool(patches) and all(patch.ours for patch in patches or ())


def problems(name: str) -> list[str]:
    """Return why a seam cannot be used; an empty list if it can."""
    seam = state.seams.get(name)
    if seam is None or seam.where is None:
        return [f"seam {name} was not found in {state.host}: {seam.why if seam else 'not looked'}"]
    if not intact(name):
        return [f"seam {name} ({seam.where}) was patched by somebody else since"]
    return [
        f"seam {name}: {shim.problem()}"
        for shim in (patch.replacement for patch in _by_seam[name])
        if isinstance(shim, _OpShim) and shim.problem()
    ]


class _NotFound(Exception):
    """A seam is not where it is looked for, or looks different."""


def _parameters(function: Any, owner: str, want: tuple[str, ...]) -> Any:
    if function is None:
        raise _NotFound(f"{owner} is gone")
    try:
        got = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise _NotFound(f"{owner} has no readable signature") from error
    if got[: len(want)] != want:
        raise _NotFound(f"{owner} takes ({', '.join(got)}), not ({', '.join(want)})")
    return function


def _exactly(function: Any, owner: str, want: tuple[str, ...]) -> Any:
    _parameters(function, owner, want)
    got = tuple(inspect.signature(function).parameters)
    if got != want:
        raise _NotFound(f"{owner} takes ({', '.join(got)}), not ({', '.join(want)})")
    return function


def _imported(name: str) -> Any:
    module = sys.modules.get(name)
    if module is None:
        raise _NotFound(f"{name} was not imported by the indexer")
    return module


def _source(module: Any) -> str:
    try:
        return inspect.getsource(module.sparse_attn_indexer)
    except (AttributeError, OSError, TypeError) as error:
        raise _NotFound("sparse_attn_indexer has no source to look into") from error


# --- guard -----------------------------------------------------------------------------------


def _guard(module: Any) -> str:
    """Look at every indexer layer when it is built.

    Why: what may be changed depends on the layer (k, context parallelism, candidate blocks, the
    cache's format) and on the engine's configuration, which can be read only while layers are
    built; and an explicit wish that cannot be met has to fail there, with all reasons.
    May go when vLLM offers a hook by which plugins see the layers of a model.
    """
    cls = getattr(module, "SparseAttnIndexer", None)
    if cls is None:
        raise _NotFound("SparseAttnIndexer is gone")
    original = vars(cls).get("__init__")
    _parameters(original, "SparseAttnIndexer.__init__", ("self", "k_cache"))

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        policy.built(self)

    _ledger.replace(cls, "__init__", __init__, "SparseAttnIndexer.__init__")
    return "SparseAttnIndexer.__init__"


# --- decode top-k ----------------------------------------------------------------------------

_FORWARD = ("self", "logits", "seq_lens", "next_n", "topk_indices", "topk_tokens", "max_seq_len")
_OP = ("logits", "lengths", "output", "workspace", "k", "max_seq_len")


def _decode_topk(module: Any) -> str:
    """Select with our top-k at decode.

    Why: upstream's kernels read float32 only, and drop or reorder candidates in ties.
    May go when vLLM's own top-k reads bfloat16, is exact, breaks ties by the lowest index and is
    not slower; or when it offers a registry for top-k backends, which then takes its place.
    """
    topk = sys.modules.get(TOPK)
    cls = getattr(topk, "SparseIndexerTopk", None)
    if cls is None:
        return _decode_topk_ops(module)
    original = _exactly(vars(cls).get("forward"), "SparseIndexerTopk.forward", _FORWARD)

    @functools.wraps(original)
    def forward(
        self: Any,
        logits: torch.Tensor,
        seq_lens: torch.Tensor,
        next_n: int,
        topk_indices: torch.Tensor,
        topk_tokens: int,
        max_seq_len: int,
    ) -> None:
        def upstream(plain: torch.Tensor, out: torch.Tensor) -> None:
            original(self, plain, seq_lens, next_n, out, topk_tokens, max_seq_len)

        wrappers.decode_topk(logits, seq_lens, next_n, topk_indices, topk_tokens, upstream)

    _ledger.replace(cls, "forward", forward, "SparseIndexerTopk.forward")
    return "SparseIndexerTopk.forward"


def _decode_topk_ops(module: Any) -> str:
    """Stand in for the compiled ops themselves, where no class is between (before 0.30)."""
    source = _source(module)
    names = [n for n in ("cooperative_topk", "persistent_topk") if f"torch.ops._C.{n}(" in source]
    if "persistent_topk" not in names:
        raise _NotFound("neither SparseIndexerTopk nor a call of torch.ops._C.persistent_topk")
    for name in names:
        _ledger.replace(torch.ops._C, name, _OpShim(name), f"torch.ops._C.{name}")
    return "torch.ops._C." + "/".join(names)


class _OpShim:
    """In place of ``torch.ops._C.<name>``: the call is ours, all else is the real packet's."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        # Taken as it is where something (another plugin, or torch's cache) is there already.
        self.resolved: Any = vars(torch.ops._C).get(name)

    def packet(self) -> Any:
        """Return the real op; resolved late, because the library may be loaded after us."""
        if self.resolved is None:
            with self._lock:
                space = torch.ops._C
                try:
                    # Finds the op in the dispatcher, and stores it under its name.
                    self.resolved = type(space).__getattr__(space, self._name)
                finally:
                    setattr(space, self._name, self)
        return self.resolved

    def problem(self) -> str | None:
        """Return why a call cannot be understood, or None."""
        where = f"torch.ops._C.{self._name}"
        try:
            packet = self.packet()
        except AttributeError:
            return f"{where} is not registered"
        schema = getattr(getattr(packet, "default", None), "_schema", None)
        if schema is not None:
            got = tuple(argument.name for argument in schema.arguments)
            if got != _OP:
                return f"{where} takes ({', '.join(got)}), not ({', '.join(_OP)})"
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.packet(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the call if it has the form the indexer uses."""
        if kwargs or len(args) != len(_OP) or plan.current().topk is None:
            return self._upstream(args, kwargs)
        logits, lengths, output, workspace, k, max_seq_len = args
        # [batch, next_n] is one length a row; fewer lengths than rows are one a request.
        if lengths.dim() == 2 and lengths.shape[1] > 1:
            next_n = lengths.shape[1]
        else:
            next_n = max(1, logits.shape[0] // max(1, lengths.numel()))

        def upstream(plain: torch.Tensor, out: torch.Tensor) -> None:
            self.packet()(plain, lengths, out, workspace, k, max_seq_len)

        return wrappers.decode_topk(logits, lengths, next_n, output, k, upstream)

    def _upstream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        slots.void()
        fill.make_up(args[2] if len(args) > 2 else kwargs.get("output"))
        if args:
            args = (wrappers.plain(args[0]), *args[1:])
        if plan.current().enabled:
            state.count("topk.decode.upstream")
        return self.packet()(*args, **kwargs)


# --- prefill top-k ---------------------------------------------------------------------------

_PREFILL = (
    "logits",
    "cu_seqlen_ks",
    "cu_seqlen_ke",
    "raw_topk_indices",
    "num_rows",
    "stride0",
    "stride1",
    "topk_tokens",
)


def _prefill_topk(module: Any) -> str:
    """Select with our top-k at prefill.

    Why: as at decode; upstream's prefill kernel has no bfloat16 form at all.
    May go when upstream's prefill top-k reads bfloat16, is exact and not slower.
    """
    ops = _imported(OPS)
    if "ops.top_k_per_row_prefill(" not in _source(module):
        raise _NotFound("sparse_attn_indexer does not call ops.top_k_per_row_prefill")
    where = "vllm._custom_ops.top_k_per_row_prefill"
    original = _exactly(vars(ops).get("top_k_per_row_prefill"), where, _PREFILL)
    replacement = _around(original, wrappers.prefill_topk)
    _ledger.replace(ops, "top_k_per_row_prefill", replacement, where)
    return where


def _around(original: Any, ours: Any) -> Any:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    return wrapper


# --- slots of the decode top-k ---------------------------------------------------------------


def _slots(module: Any) -> str:
    """Hand the attention the pool slots that our decode top-k wrote beside its indices.

    Why: after every top-k vLLM runs a kernel that does nothing else. Only looked for here: the
    attention's module imports the indexer's, so :func:`reach_slots` patches it later.
    May go when vLLM's top-k writes slots, or its attention reads indices.
    """
    try:
        return probe.slots().where or ""
    except Missing as error:
        raise _NotFound(str(error)) from error


def reach_slots() -> list[str]:
    """Patch the attention's module, if this model has it; return why it cannot be used."""
    name = "topk.slots"
    seam = state.seams.get(name)
    if seam is None or seam.where is None:
        return problems(name)
    module = sys.modules.get(probe.ATTENTION)
    if module is None:
        return [f"{probe.ATTENTION} is not this model's attention"]
    if not _by_seam[name]:
        try:
            original = _exactly(vars(module).get(probe.TO_SLOTS), seam.where, probe.TO_SLOTS_TAKES)
        except _NotFound as error:
            return [str(error)]
        wrapper = _around(original, slots.taken)
        _by_seam[name] = [_ledger.replace(module, probe.TO_SLOTS, wrapper, seam.where)]
    return problems(name)


# --- the fill before the selection -----------------------------------------------------------

_INDEXER_OP = "torch.ops.vllm.sparse_attn_indexer"


def _fill(module: Any) -> str:
    """Leave out the fill with -1 where our top-k writes every row.

    Why: vLLM fills all rows before every selection, a kernel of its own; the op's argument for
    leaving it out is one that the layer never passes. Only looked for here: :func:`reach_fill`
    stands in for the op once it is known that nothing traces the call.
    May go when the layer passes it, or vLLM's top-k is known to write every row.
    """
    op = _IndexerOp()
    missing = [name for name in fill.NEEDED if name not in op.names]
    if missing:
        raise _NotFound(f"{_INDEXER_OP} takes no {' and no '.join(missing)}")
    return _INDEXER_OP


def reach_fill(config: Any) -> list[str]:
    """Stand in for the indexer's op; return why that cannot be."""
    name = "topk.fill"
    seam = state.seams.get(name)
    if seam is None or seam.where is None:
        return problems(name)
    mode = getattr(getattr(config, "compilation_config", None), "mode", None)
    if getattr(mode, "name", None) != "NONE":
        return ["the model is compiled, so the call of the op is traced"]
    if not _by_seam[name]:
        patch = _ledger.replace(torch.ops.vllm, "sparse_attn_indexer", _IndexerOp(), _INDEXER_OP)
        _by_seam[name] = [patch]
    return problems(name)


class _IndexerOp:
    """In place of ``torch.ops.vllm.sparse_attn_indexer``: the same op, maybe with one more word."""

    def __init__(self) -> None:
        try:
            self.resolved: Any = torch.ops.vllm.sparse_attn_indexer
            schema = self.resolved.default._schema
        except AttributeError as error:
            raise _NotFound(f"{_INDEXER_OP} is not registered") from error
        self.names = tuple(argument.name for argument in schema.arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.resolved, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the op."""
        if torch.compiler.is_compiling():
            return self.resolved(*args, **kwargs)
        return fill.left_out(self.resolved, self.names, args, kwargs)


# --- logits ----------------------------------------------------------------------------------


def _logits(module: Any) -> str:
    """Mark the index logits on their way to top-k; compute them, or ask DeepGEMM for bfloat16.

    Why: vLLM never passes DeepGEMM's ``logits_dtype``, though V4 was trained with bfloat16 scores;
    half the bytes are written and read. Our own kernel writes them, or DeepGEMM where ours cannot
    and it can (not 0.33's on Hopper). The mark is what tells our logits from those of other callers
    of the same top-k.
    May go when vLLM can be configured to write bfloat16 logits and its top-k reads them.
    """
    names = ("fp8_fp4_paged_mqa_logits", "fp8_fp4_mqa_logits")
    _parameters(vars(module).get(names[0]), names[0], ("q", "kv_cache", "weights"))
    _parameters(vars(module).get(names[1]), names[1], ("q", "kv", "weights"))
    keep = vars(module).get("as_fp32_logits")
    if keep is not None:
        _parameters(keep, "as_fp32_logits", ("logits",))
    for name, ours in zip(names, (wrappers.paged_logits, wrappers.dense_logits), strict=True):
        original = vars(module)[name]
        _ledger.replace(module, name, _around(original, ours), name)
    if keep is not None:
        # Why: would widen logits that our top-k wants as they are. May go with the above.
        replacement = _around(keep, wrappers.as_fp32_logits)
        _ledger.replace(module, "as_fp32_logits", replacement, "as_fp32_logits")
    return "/".join((*names, *(("as_fp32_logits",) if keep is not None else ())))


_IMPLS = ("_fp8_fp4_paged_mqa_logits_impl", "_fp8_fp4_mqa_logits_impl")


def takes_logits_dtype() -> bool:
    """Whether vLLM's DeepGEMM can be asked for bfloat16 logits; prepares the asking.

    DeepGEMM is resolved by vLLM when it is first used, so this cannot be done at install time.
    """
    deep_gemm = sys.modules.get(DEEP_GEMM)
    resolve = getattr(deep_gemm, "_lazy_init", None)
    if deep_gemm is None or resolve is None:
        return False
    resolve()
    for name in _IMPLS:
        stale = [p for p in _ledger.patches if p.owner is deep_gemm and p.name == name]
        if stale and stale[0].ours:
            continue
        if stale:  # vLLM resolved DeepGEMM anew
            _ledger.patches.remove(stale[0])
        implementation = getattr(deep_gemm, name, None)
        if implementation is None or not has_logits_dtype(implementation):
            return False
        _ledger.replace(deep_gemm, name, _asked(implementation), f"{DEEP_GEMM}.{name}")
    return True


def _asked(implementation: Any) -> Any:
    """Pass ``logits_dtype`` on the calls that come from the indexer; all others as they are."""

    def with_dtype(*args: Any, **kwargs: Any) -> Any:
        if wrappers.asking.bf16:
            kwargs["logits_dtype"] = torch.bfloat16
        return implementation(*args, **kwargs)

    with_dtype.__doc__ = implementation.__doc__
    with_dtype.__wrapped__ = implementation  # type: ignore[attr-defined]
    return with_dtype


# --- gather ----------------------------------------------------------------------------------

_GATHER = ("kv_cache", "dst_k", "dst_scale", "block_table", "cu_seq_lens")


def _gather(module: Any) -> str:
    """Gather the quantised keys of a prefill chunk with our kernel.

    Why: the same bytes with fewer instructions; a platform without vLLM's compiled op has one.
    May go when upstream's kernel reaches the byte floor.
    """
    ops = _imported(OPS)
    where = "vllm._custom_ops.cp_gather_indexer_k_quant_cache"
    original = _exactly(vars(ops).get("cp_gather_indexer_k_quant_cache"), where, _GATHER)
    replacement = _around(original, wrappers.gather)
    _ledger.replace(ops, "cp_gather_indexer_k_quant_cache", replacement, where)
    return where


# --- budget ----------------------------------------------------------------------------------

_PLAN = ("workspace_size", "max_logits_bytes", "request_offset")


def _budget(module: Any) -> str:
    """Let the planner of prefill chunks count bfloat16 logits as two bytes.

    Why: it keeps a chunk's logits below ``VLLM_SPARSE_INDEXER_MAX_LOGITS_MB`` and counts four bytes
    each; in bfloat16 the same bytes hold twice the rows, so there are fewer and larger chunks.
    May go when the planner asks for the logits' dtype.
    """
    planner = _imported(PLANNER)
    cls = getattr(planner, "DeepseekV32IndexerMetadataBuilder", None)
    name = "_split_indexer_prefill_chunks"
    raw = vars(cls).get(name) if cls is not None else None
    if isinstance(raw, staticmethod):
        owner, where, original = cls, f"DeepseekV32IndexerMetadataBuilder.{name}", raw.__func__
    else:
        owner, name, where = planner, name[1:], name[1:]
        original = vars(planner).get(name)
    if original is None:
        raise _NotFound(f"{PLANNER} has no split_indexer_prefill_chunks")
    got = tuple(inspect.signature(original).parameters)
    if len(got) != 5 or got[2:] != _PLAN:
        raise _NotFound(f"{where} takes ({', '.join(got)}), not (…, …, {', '.join(_PLAN)})")
    if "max_logits_bytes // 4" not in inspect.getsource(original):
        raise _NotFound(f"{where} does not count four bytes for each of the logits")
    wrapper = _around(original, wrappers.prefill_chunks)
    _ledger.replace(owner, name, wrapper if owner is planner else staticmethod(wrapper), where)
    return where
