"""SGLang's and TokenSpeed's own indexer code on a GPU, without the plugin and with it.

``python -m benchmarks.engines.forward --engine sglang --site FOLDER --json FILE``: the engine's
Python and kernels, from folders in which its packages lie; what it would need of a model, a
scheduler and the packages that are not there is stood in for, and the results say by what.
"""
