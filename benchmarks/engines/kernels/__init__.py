"""``--part kernels``: what the adapters install, beside the engines' own kernels."""
