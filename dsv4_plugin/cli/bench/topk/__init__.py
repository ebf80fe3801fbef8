"""The top-k's cases, checks and benchmark: one generator feeds the tests and ``bench topk``."""

__all__ = ["UsageError"]


class UsageError(ValueError):
    """What a user of ``dsv4-plugin bench`` can repair: an option or a file of theirs."""
