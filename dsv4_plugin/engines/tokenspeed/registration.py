"""Put the plugin's kernels into TokenSpeed's registry, and find TokenSpeed's own for a fallback.

TokenSpeed offers the registry for this purpose; this module patches nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dsv4_plugin import envs, facts, log
from dsv4_plugin.engines.shared import decision
from dsv4_plugin.engines.shared.adapter import end
from dsv4_plugin.engines.shared.decision import DTYPES, KS, Selection
from dsv4_plugin.engines.shared.fallback import serve
from dsv4_plugin.engines.shared.tensors import rows_of
from dsv4_plugin.engines.tokenspeed import adapter, dsv41, kernels, policy, probe
from dsv4_plugin.errors import SettingError, UnmetError
from dsv4_plugin.kernels import cuda
from dsv4_plugin.state import state

__all__ = ["SOLUTION", "install", "uninstall"]

SOLUTION = "dsv4_plugin"
FAMILY = "attention"
_PLUGIN: dict[str, Callable[..., Any]] = {
    "dsa_decode_topk": kernels.dsa_decode,
    "dsa_prefill_topk": kernels.dsa_prefill,
    "dsv4_decode_topk": kernels.dsv4_decode,
    "dsv4_prefill_topk": kernels.dsv4_prefill,
    probe.DSV41: dsv41.index_topk,
}
_FEATURES = {
    "dsa_decode_topk": {"logical_offsets", "batch_invariant"},
    "dsa_prefill_topk": {"batch_invariant"},
}


def install() -> None:
    """Register a kernel for every mode that exists, unless all of them would be idle."""
    now = adapter.ensure()
    if now.kernels:
        log.debug(f"{now.engine}: the plugin's kernels are registered already")
        return
    found = {name: site for name, site in probe.look().items() if name.startswith("topk.")}
    for name, site in found.items():
        now.found(name, site.where, site.why or "no call came yet")
    explicit = decision.explicit()
    missing = now.missing(logging.ERROR if explicit else logging.INFO, "topk.")
    if len(missing) == len(found):
        return
    idle = _idle(explicit)
    if idle:
        for name, site in found.items():
            if site.where is not None:
                state.seams[name].why = idle
        log.once(logging.INFO, f"dsv4 inactive in {now.engine}: top-k: the engine's ({idle})")
        return
    keeps_reader = _setting("indexer_read") == "off"
    for mode in probe.MODES:
        seam = state.seams[f"topk.{mode}"]
        if seam.where is None:
            continue
        if mode == "dsa_prefill_topk" and keeps_reader:
            seam.why = "DSV4_INDEXER_READ=off: it reads the keys itself"
            continue
        try:
            now.kernels.append(_register(mode, explicit))
        except Exception as error:  # the registry has an unknown form
            seam.why = f"could not be registered ({type(error).__name__}: {error})"
            log.once(logging.WARNING, f"{now.engine}: {mode} {seam.why}; the engine's own stays")


def _setting(name: str) -> Any:
    try:
        return envs.value(name)
    except SettingError:  # raised again, as an error, at the first call
        return None


def _idle(explicit: bool) -> str | None:
    """Return why no kernel of the plugin could ever serve here, or None.

    With an explicit setting the kernels are registered in every case, because their first call
    raises the error with every unmet condition.
    """
    if _setting("topk") == "off":
        return "DSV4_TOPK=off"
    if explicit:
        return None
    from tokenspeed_kernel.platform import current_platform

    reasons = []
    here = current_platform()
    arch = (here.arch_version.major, here.arch_version.minor)
    if here.vendor != "nvidia" or arch not in cuda.CAPABILITIES:
        reasons.append(f"the GPU is {here.device_name} ({arch[0]}.{arch[1]}), not Hopper (9.0)")
    else:
        facts.library(arch)
    missing = cuda.missing()
    if missing:
        reasons.append(missing)
    return "; ".join(reasons) or None


def _signatures(mode: str) -> frozenset[Any]:
    from tokenspeed_kernel.signature import dense_tensor_format as dense
    from tokenspeed_kernel.signature import format_signature

    if mode == probe.DSV41:
        return frozenset({format_signature(x=dense(torch.bfloat16))})
    if mode.startswith("dsa"):
        return frozenset(
            format_signature(q=dense(torch.bfloat16), weights=dense(weights))
            for weights in (torch.float32, torch.bfloat16)
        )
    roles = {"q": torch.float8_e4m3fn, "weights": torch.float32, "index_k_cache": torch.uint8}
    return frozenset({format_signature(**{role: dense(t) for role, t in roles.items()})})


def _traits(mode: str) -> dict[str, frozenset[Any]]:
    """Return the traits that the registry checks; V4.1's op checks its calls and gives reasons."""
    if mode == probe.DSV41:
        return {}
    traits: dict[str, frozenset[Any]] = {
        "index_heads": frozenset({32, 64}),  # those of DeepGEMM
        "head_dim": frozenset({128}),
        "page_size": frozenset({64}),
        "topk": frozenset(KS),
        "index_k_format": frozenset({"fp8_scaled"}),
    }
    if mode.startswith("dsa"):
        traits["index_k_layout"] = frozenset({"page_planar"})  # what DeepSeek-V4 writes
    if mode == "dsa_decode_topk":
        traits["q_len"] = frozenset({1})
    return traits


def _register(mode: str, explicit: bool) -> str:
    """Register the kernel of a mode, and return its name."""
    from tokenspeed_kernel.platform import ArchVersion, CapabilityRequirement
    from tokenspeed_kernel.registry import Priority, register_kernel

    hopper = ArchVersion(9, 0)
    bounds = {} if explicit else {"min_arch_version": hopper, "max_arch_version": hopper}
    name = f"{SOLUTION}_{mode}"
    register_kernel(
        FAMILY,
        mode,
        name=name,
        features=_FEATURES.get(mode),
        solution=SOLUTION,
        capability=CapabilityRequirement(vendors=frozenset({"nvidia"}), **bounds),
        signatures=_signatures(mode),
        traits=_traits(mode),
        priority=Priority.PLUGIN,
    )(_kernel(mode))
    log.say(logging.DEBUG, f"kernel {name}: registered for {mode}")
    return name


def _kernel(mode: str) -> Callable[..., Any]:
    """Make the function for the registry: the plugin's kernel, after an error TokenSpeed's own."""
    first = probe.MODES[mode]
    plugin = _PLUGIN[mode]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(first, args, strict=False)), **kwargs}
        index = kwargs.get("q", kwargs.get("index_q"))
        q = index[0] if isinstance(index, tuple) else index
        assert isinstance(q, torch.Tensor)
        chosen = _decide(mode, kwargs, q.device)
        result: list[Any] = []

        def by_plugin(selection: Selection) -> None:
            try:
                result.append(plugin(selection, **kwargs))
            except UnmetError as error:
                log.once(logging.INFO, f"{error}; the engine's own kernel serves such calls")
                raise

        def by_engine() -> None:
            result.append(_by_engine(mode, q, kwargs))

        dtype = DTYPES[chosen.dtype] if chosen is not None else torch.float32
        serve(mode, chosen, dtype, by_plugin, by_engine, rows=rows_of(q))
        return result[0]

    kernel.__name__ = f"{SOLUTION}_{mode}"
    kernel.__doc__ = plugin.__doc__
    return kernel


def _decide(mode: str, kwargs: Mapping[str, Any], device: torch.device) -> Selection | None:
    """Return how a call selects, or None for TokenSpeed's own kernel."""
    if mode != probe.DSV41:
        return policy.decide(mode, kwargs["topk"], device)
    if dsv41.is_prefill(kwargs) and _setting("indexer_read") == "off":
        log.once(logging.INFO, f"DSV4_INDEXER_READ=off: {mode} of prefill stays the engine's")
        return None
    layer, unfit = dsv41.layer_of(kwargs), dsv41.unfit(kwargs)
    return policy.decide(mode, kwargs["topk"], device, layer, unfit)


def _by_engine(mode: str, q: torch.Tensor, kwargs: Mapping[str, Any]) -> Any:
    """Run the kernel that TokenSpeed would have chosen without the plugin."""
    if mode != probe.DSV41:
        return _next(mode, q, kwargs)(**kwargs)
    if dsv41.layer_of(kwargs) == "source" and adapter.ensure().decision.enabled:
        state.count("candidates.source.engine", rows_of(q))
    from tokenspeed_kernel.ops.attention.dsv41 import index_topk
    from tokenspeed_kernel.platform import current_platform
    from tokenspeed_kernel.registry import KernelRegistry
    from tokenspeed_kernel.selection import NoKernelFoundError, resolve_kernel_override

    registry = KernelRegistry.get()
    specs = registry.get_for_operator(FAMILY, mode, platform=current_platform())
    specs = [spec for spec in specs if spec.solution != SOLUTION]  # highest priority first
    if specs and resolve_kernel_override(FAMILY, mode, None):
        # An override names the plugin's kernel and wins over a requested solution. The kernel of
        # the lowest priority is TokenSpeed's portable one, which takes every call.
        return registry.get_impl(specs[-1].name)(**kwargs)
    # Only the facade knows the traits of a call, so ask it for one solution after the other.
    for solution in dict.fromkeys(spec.solution for spec in specs):
        try:
            return index_topk(**kwargs, solution=solution)
        except NoKernelFoundError:
            continue
    raise UnmetError(f"{mode} by a kernel of TokenSpeed's own", ["the registry has no other"])


def _next(mode: str, q: torch.Tensor, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the kernel that TokenSpeed would have chosen without the plugin."""
    from tokenspeed_kernel.platform import current_platform
    from tokenspeed_kernel.registry import KernelRegistry
    from tokenspeed_kernel.selection import spec_matches_traits
    from tokenspeed_kernel.signature import dense_tensor_format, format_signature

    tensors = {"q": q, "weights": kwargs["weights"]}
    traits: dict[str, Any] = {
        "index_heads": int(q.shape[-2]),
        "head_dim": int(q.shape[-1]),
        "page_size": kwargs.get("page_size"),
        "topk": int(kwargs["topk"]),
        "index_k_format": "fp8_scaled",
    }
    features = set()
    if mode.startswith("dsa"):
        traits["index_k_layout"] = "page_planar"
    else:
        tensors["index_k_cache"] = kwargs["index_k_cache"]
    if mode == "dsa_decode_topk":
        traits["q_len"] = int(kwargs.get("q_len_per_req", 1))
        if kwargs.get("topk_layout") == "logical_offsets":
            features.add("logical_offsets")
    if kwargs.get("batch_invariant"):
        features.add("batch_invariant")
    roles = {role: dense_tensor_format(tensor.dtype) for role, tensor in tensors.items()}
    registry = KernelRegistry.get()
    specs = registry.get_for_operator(
        FAMILY,
        mode,
        features=frozenset(features),
        platform=current_platform(),
        format_signature=format_signature(**roles),
    )
    for spec in specs:  # highest priority first
        if spec.solution != SOLUTION and spec_matches_traits(spec, traits):
            implementation = registry.get_impl(spec.name)
            if implementation is not None:
                return implementation
    raise UnmetError(f"{mode} by a kernel of TokenSpeed's own", ["the registry has no other"])


def uninstall() -> None:
    """Take the plugin's kernels out of the registry, and end the adapter."""
    now = adapter.current()
    if now is None:
        return
    if now.kernels:
        from tokenspeed_kernel.registry import KernelRegistry

        take_out = getattr(KernelRegistry.get(), "_unregister", None)
        if take_out is not None:
            for name in now.kernels:
                take_out(name)
                log.say(logging.DEBUG, f"kernel {name}: taken out")
    end()
