"""The benchmarks of the index logits and of the chain to indices, beside those of the top-k."""
