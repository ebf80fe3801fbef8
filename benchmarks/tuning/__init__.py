"""Sweeps of the kernels' choices."""
