"""``dsv4-plugin bench``: the times of the ops beside other implementations."""
