"""``dsv4-plugin bench adapters``: what the adapters install, beside the engines' own kernels."""
