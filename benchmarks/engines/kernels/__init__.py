"""``--part kernels``: the functions that the adapters install, beside the engines' own kernels."""
