"""Where an engine's own top-k is faster than the plugin's; do not edit.

``python -m benchmarks.tables aside-table`` makes this file of
``benchmarks/results/h200_aside.json`` (NVIDIA H200, commit 69ceaf8).
"""

# engine -> the release whose kernels were measured
SINCE: dict[str, tuple[int, ...]] = {
    "vllm": (0, 33),
    "sglang": (0, 5, 23),
}

SMS = 132  # multiprocessors of the GPU that was measured
# call -> the widest buffer that was measured, in scores
WIDEST: dict[str, int] = {
    "sglang.dsa": 65536,
    "vllm.decode": 262144,
    "vllm.prefill": 131072,
}
NARROW = 131072  # a buffer that is wider is a wide one

# call, k -> (rows, up to which length of a row the call is the engine's in a narrow
# buffer, and in a wide one); 0: it is the plugin's
LONGEST: dict[tuple[str, int], tuple[tuple[int, int, int], ...]] = {
    ("sglang.dsa", 2048): (
        (1, 16384, 0),
        (8, 8192, 0),
        (15, 8192, 0),
        (16, 16384, 0),
        (32, 32768, 0),
        (64, 32768, 0),
        (128, 32768, 0),
        (256, 32768, 0),
    ),
    ("vllm.decode", 2048): (
        (1, 8192, 8192),
        (8, 8192, 8192),
        (16, 8192, 8192),
        (32, 8192, 8192),
        (64, 8192, 8192),
        (65, 8192, 8192),
        (128, 131072, 262144),
        (256, 0, 262144),
        (512, 0, 262144),
    ),
    ("vllm.prefill", 2048): (
        (64, 0, 0),
        (256, 16384, 0),
        (1024, 32768, 0),
        (4096, 32768, 0),
    ),
}
