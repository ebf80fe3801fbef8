"""The implementations of the ops, with the same signatures in every module.

The module ``reference`` is the oracle of the tests.
"""
