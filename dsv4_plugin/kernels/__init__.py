"""The implementations of the ops: same signatures in every module, ``reference`` is the oracle."""
