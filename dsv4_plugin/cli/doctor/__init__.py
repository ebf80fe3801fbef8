"""``dsv4-plugin doctor``: what is here, what engages, and why not."""
