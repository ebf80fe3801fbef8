"""A whole vLLM server with a random DeepSeek-V4, measured: ``python -m benchmarks.server``.

| module | what it does |
|---|---|
| :mod:`.command` | the order of the steps, the results file |
| :mod:`.options` | what this command and the drills take; their servers |
| :mod:`.server` | starts a server, waits for it, stops it; reads its log |
| :mod:`.client` | requests with token ids: what one costs, what it answers |
| :mod:`.measure` | the steps: outputs, time per token, time to the first token, profiles |
| :mod:`.drills` | servers with one fault each: that they go on serving, and say why |
| :mod:`.trace` | a torch-profiler trace → microseconds a step of each part of the indexer |
| :mod:`.figures` | the tables of docs/vllm.md |
| :mod:`.vllm_side` | what runs in the server: random weights, contexts by copying, status |

``examples/make_tiny_v4.py`` writes the model that is served. None of this imports vLLM or needs
torch in its own process, except :mod:`.vllm_side`, which runs inside the server.
"""
