"""Run TokenSpeed's real kernel registry, facades, plugin loaders and readers.

On a CPU for the tests, on a GPU for ``benchmarks.engines.forward``.

TokenSpeed's own Python runs: registry, selection, the ``dsa_*`` and ``dsv4_*`` facades,
``discover_plugins`` and ``ensure_loaded`` with the installed entry points, the writer and reader of
the indexer cache. The parts that need a GPU are replaced; :data:`STANDS_IN` says how. On a GPU
TokenSpeed's Triton kernels and DeepGEMM are the real ones (:data:`STANDS_IN_ON_GPU`).

The package's ``__init__`` imports every op and every native package, so the kit imports the
sub-modules directly. On a CPU it reports an Ampere GPU during the imports, so that Hopper's native
packages are not imported, and a Hopper GPU afterwards.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kits.engine_parts import (
    HEAD_DIM,
    Call,
    DeepGemm,
    DeepGemmModule,
    make_cache,
    record_plugin_logits,
)
from kits.stand_ins import alias, stand_in

__all__ = ["STANDS_IN", "STANDS_IN_ON_GPU", "Engine"]

STANDS_IN = {
    "DeepGEMM": "the same formula in torch, row stride and unwritten columns alike",
    "the GPU": "a platform that says 'NVIDIA, 9.0' (or what a test asks for)",
    "tokenspeed_triton, flashinfer, deep_ep, trtllm_kernel, fast_hadamard_transform": "empty "
    "modules: nothing of them is called",
}

STANDS_IN_ON_GPU = {
    "tokenspeed_triton, where it is not installed": "Triton: TokenSpeed's kernels compiled by it",
    "the model, scheduler and memory pools": "random queries and keys in tensors like TokenSpeed's",
}

PAGE = 64
NATIVE = ("tokenspeed_triton", "flashinfer", "deep_ep", "trtllm_kernel", "fast_hadamard_transform")
# What the modules for Hopper import besides; nothing of it is called here.
NATIVE_ON_GPU = (
    *NATIVE[1:],
    "cutlass",
    "quack",
    "flash_mla",
    "flash_attn",
    "tokenspeed_mla",
    "nvtx",
)
DSA = "tokenspeed_kernel.ops.attention.dsa"
DSV4 = "tokenspeed_kernel.ops.attention.dsv4"
OPS = "tokenspeed.runtime.layers.attention.deepseek_v4_ops"


class Engine:
    """TokenSpeed's kernel package and its runtime's readers. One per process.

    ``stood_in`` names the packages that are empty modules here.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.calls: list[Call] = []
        if device == "cpu":
            self.stood_in = stand_in(NATIVE)
        else:
            alias("tokenspeed_triton", "triton")
            self.stood_in = stand_in(NATIVE_ON_GPU)
        kernel = importlib.util.find_spec("tokenspeed_kernel")
        if kernel is None or kernel.origin is None:
            raise ImportError("tokenspeed_kernel is not on the path")
        package = types.ModuleType("tokenspeed_kernel")
        package.__path__ = [str(Path(kernel.origin).parent)]
        sys.modules["tokenspeed_kernel"] = package
        self.platform: Any = importlib.import_module("tokenspeed_kernel.platform")
        if device == "cpu":
            self.pose(8)
        self.registry_module: Any = importlib.import_module("tokenspeed_kernel.registry")
        self.plugins: Any = importlib.import_module("tokenspeed_kernel.plugins")
        self.selection: Any = importlib.import_module("tokenspeed_kernel.selection")
        if device == "cpu":
            self.maths = DeepGemm(self.calls, has_logits_dtype=True)
            record_plugin_logits(self.calls)
            self.install_deep_gemm()
        self.dsa: Any = importlib.import_module(DSA)
        self.dsv4: Any = importlib.import_module(DSV4)
        if device == "cpu":
            self._pose_as_hopper()

    def _pose_as_hopper(self) -> None:
        self.pose(9)
        # What these modules guard by the architecture at import: Hopper's own registrations.
        module: Any = importlib.import_module(f"{DSV4}.deep_gemm")
        module.deep_gemm = sys.modules["deep_gemm"]
        module._register("fp8_scaled", self.platform.ArchVersion(9, 0))
        importlib.reload(importlib.import_module(f"{DSA}.deep_gemm"))

    def pose(self, major: int, minor: int = 0) -> None:
        """Be a GPU of this compute capability."""
        self.platform.Platform.override(
            self.platform.PlatformInfo(
                vendor="nvidia",
                arch_version=self.platform.ArchVersion(major, minor),
                device_name=f"a pose as sm{major}{minor}",
                device_count=1,
                total_memory=1 << 37,
                memory_bandwidth=4800.0,
                sm_count=132,
                max_threads_per_sm=2048,
                max_shared_memory_per_sm=228 << 10,
            )
        )

    def install_deep_gemm(self, has_logits_dtype: bool = True) -> Any:
        """Put the stand-in where TokenSpeed imports DeepGEMM from."""
        self.deep_gemm = DeepGemmModule(self.maths, has_logits_dtype)
        sys.modules["deep_gemm"] = self.deep_gemm
        return self.deep_gemm

    @property
    def registry(self) -> Any:
        """TokenSpeed's kernel registry."""
        return self.registry_module.KernelRegistry.get()

    def discover(self) -> list[str]:
        """Load the kernel plugins through their entry points; returns the plugin's."""
        loaded = self.plugins.discover_plugins(force=True)
        return [name for info in loaded if info.name == "dsv4" for name in info.kernel_names]

    def chosen(self, mode: str, k: int = 512, **traits: Any) -> str:
        """Return the kernel that TokenSpeed selects for DeepSeek-V4 in ``mode``."""
        signature = importlib.import_module("tokenspeed_kernel.signature")
        dense = signature.dense_tensor_format
        wanted: dict[str, Any] = {
            "index_heads": 64, "head_dim": 128, "page_size": PAGE, "topk": k,
            "index_k_format": "fp8_scaled",
        }  # fmt: skip
        features = None
        if mode == "dsv41_index_topk":
            roles = {"x": dense(torch.bfloat16)}
            wanted = {"index_heads": 32, "index_k_format": "fp8_scaled", "index_shards": 1,
                      "native_indexer": True}  # fmt: skip
        elif mode.startswith("dsa"):
            roles = {"q": dense(torch.bfloat16), "weights": dense(torch.float32)}
            wanted["index_k_layout"] = "page_planar"
            if mode == "dsa_decode_topk":
                wanted["q_len"] = 1
                features = frozenset({"logical_offsets"})
        else:
            roles = {
                "q": dense(torch.float8_e4m3fn),
                "weights": dense(torch.float32),
                "index_k_cache": dense(torch.uint8),
            }
        return self.selection.select_kernel(
            "attention", mode, signature.format_signature(**roles), traits={**wanted, **traits},
            features=features,
        ).name  # fmt: skip

    def batch(self, lengths: Sequence[int], *, pad: int = 1024, seed: int = 0) -> dict[str, Any]:
        """Make a decode batch over a plane that is a strided view of an arena."""
        g = torch.Generator().manual_seed(seed)
        rows, width = len(lengths), max(1, -(-max([*lengths, 1]) // PAGE))
        total = 1 + rows * width
        table = (1 + torch.randperm(total - 1, generator=g)).view(rows, width).to(torch.int32)
        return {
            "plane": make_cache(total, page_size=PAGE, pad=pad, seed=seed),
            "table": table,
            "lengths": torch.tensor(list(lengths), dtype=torch.int32),
            "q": torch.randn(rows, 64, HEAD_DIM, generator=g).to(torch.bfloat16),
            "weights": torch.randn(rows, 64, generator=g),
        }

    def runtime(self) -> Any:
        """Import the runtime's ops on the indexer cache."""
        return importlib.import_module(OPS)

    def load_runtime_plugins(self) -> Any:
        """Run the runtime's own ``ensure_loaded`` as a new process would."""
        plugins: Any = importlib.import_module("tokenspeed.runtime.plugins")
        plugins._loaded = False
        plugins._loaded_plugins.clear()
        return plugins.ensure_loaded()
