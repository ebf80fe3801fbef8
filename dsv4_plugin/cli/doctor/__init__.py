"""``dsv4-plugin doctor``: what is installed, what engages, and why not."""
