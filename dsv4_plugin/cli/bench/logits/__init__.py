"""The benchmarks of the index logits, and of the chain from logits to indices."""
