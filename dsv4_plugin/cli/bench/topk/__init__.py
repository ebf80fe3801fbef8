"""The top-k's cases, checks and benchmark: one generator feeds the tests and ``bench topk``."""
