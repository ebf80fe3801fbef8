"""The values of options. They are here so that an option is checked without importing torch."""

from __future__ import annotations

__all__ = [
    "CACHES", "CANDIDATE_SUITES", "ENGINES", "KS", "LOGITS_DTYPES", "LOGITS_SUITES",
    "RECALL_DTYPES", "RECALL_KINDS", "TOPK_DTYPES", "TOPK_SUITES",
]  # fmt: skip

KS = (512, 1024, 2048)  # of the models; the last is the most that the top-k takes

TOPK_DTYPES = ("bfloat16", "float16", "float32")  # of the logits, torch's names
TOPK_SUITES = ("decode", "served", "narrow", "adversarial", "prefill", "paged")
LOGITS_DTYPES = TOPK_DTYPES
LOGITS_SUITES = ("decode", "next_n", "varied", "prefill")
CANDIDATE_SUITES = ("decode", "prefill")
CACHES = ("fp8", "fp4")  # of the index layers of V4.1
ENGINES = ("vllm", "sglang", "flashinfer", "torch")  # the engines whose kernels --against loads

# Drawn scores -> their distribution.
RECALL_KINDS = {
    "normal": "N(0, 1)",
    "relu_sum": "weights in (0, 1)",
    "relu_sum_signed": "weights N(0, 1)",
}
RECALL_DTYPES = ("bfloat16", "float16")  # the dtypes that `recall` selects in, by torch's names
