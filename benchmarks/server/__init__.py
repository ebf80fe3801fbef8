"""A whole vLLM server with a random DeepSeek-V4 or V4.1, measured: ``python -m benchmarks.server``.

| module | what it does |
|---|---|
| :mod:`.command` | the order of the steps, the results file |
| :mod:`.model` | what a model's configuration says: layers with an indexer, arguments for vLLM |
| :mod:`.options` | what this command and the drills take; their servers |
| :mod:`.server` | starts a server, waits for it, stops it; reads its log |
| :mod:`.client` | requests with token ids: what one costs, what it answers |
| :mod:`.measure` | the steps: outputs, time per token, time to the first token, profiles |
| :mod:`.drills` | servers with one fault each: that they go on serving, and say why |
| :mod:`.trace` | a torch-profiler trace → microseconds a step of each part of the indexer |
| :mod:`.vllm_side` | what runs in the server: random weights, contexts by copying, status |

``examples/make_tiny_v4.py`` and ``make_tiny_v41.py`` write the model that is served,
:mod:`benchmarks.tables.server` the tables of docs/vllm.md. None of this imports vLLM or needs torch
in its own process, except :mod:`.vllm_side`, which runs inside the server.
"""
