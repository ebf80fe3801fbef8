"""What the options choose among. Here because a mistyped one is told without importing torch."""

from __future__ import annotations

__all__ = ["ADAPTERS", "SGLANG_CALLS", "TOKENSPEED_CALLS"]

ADAPTERS = ("sglang", "tokenspeed")
SGLANG_CALLS = ("paged", "paged_raw", "dsa", "prefill")
TOKENSPEED_CALLS = (
    "dsa_decode", "dsa_decode_slots", "dsv4_decode", "dsa_prefill", "gather", "read_fp8",
    "read_mxfp4",
)  # fmt: skip
