"""``dsv4-plugin bench``: the ops' times, beside other implementations."""
