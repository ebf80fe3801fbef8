"""Whole servers of a random DeepSeek-V4 or V4.1, measured: ``python -m benchmarks.server``.

| module | what it does |
|---|---|
| :mod:`.command` | the order of the steps, the results file |
| :mod:`.model` | what a model's configuration says: layers with an indexer |
| :mod:`.engines` | what differs between vLLM and SGLang: a record each |
| :mod:`.options` | what this command and the drills take; their servers |
| :mod:`.server` | the server of ``dsv4-plugin ab`` with a folder; its log and workers' files |
| :mod:`.client` | requests with token ids: what one costs, what it answers |
| :mod:`.measure` | the steps: outputs, time per token, time to the first token, profiles |
| :mod:`.drills` | servers with one fault each: that they go on serving, and say why |
| :mod:`.trace` | a torch-profiler trace → microseconds a step of each part of the indexer |
| :mod:`.side` | what runs in every server: random weights, faults, status, rows |
| :mod:`.vllm_side`, :mod:`.sglang_side` | how that is loaded; contexts by copying |

``examples/make_tiny_v4.py`` and ``make_tiny_v41.py`` write the model that is served,
:mod:`benchmarks.tables.server` the tables of docs/vllm.md. None of this imports an engine or needs
torch in its own process, except the sides, which run inside the server.
"""
