"""``dsv4-plugin recall``: how much of the exact float32 selection a narrower dtype keeps."""

__all__ = ["PAPER"]

# The published figure that the results are compared with.
PAPER = {
    "recall": 0.997,
    "dtype": "bfloat16",
    "source": "the DeepSeek-V4 report on its own index scores, as vLLM #40811 quotes it: "
    '"preserving a 99.7% recall rate of KV entries"; k and context are not given',
}
