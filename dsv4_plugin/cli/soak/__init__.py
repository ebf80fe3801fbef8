"""``dsv4-plugin soak``: :mod:`.command` has the options, :mod:`.load` the load."""
