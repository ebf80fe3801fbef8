"""Whole servers of a random DeepSeek-V4 or V4.1, measured: ``python -m benchmarks.server``.

| module | what it does |
|---|---|
| :mod:`.command` | the order of the steps, the results file |
| :mod:`.model` | reads a model's configuration: layers with an indexer |
| :mod:`.engines` | the differences between vLLM, SGLang and TokenSpeed: one record for each |
| :mod:`.options` | the options of this command and of the drills; their servers |
| :mod:`.server` | the server of ``dsv4-plugin ab`` with a folder; its log and workers' files |
| :mod:`.client` | requests with token ids: their time and their answers |
| :mod:`.measure` | the steps: outputs, time per token, time to the first token, profiles |
| :mod:`.drills` | servers with one fault or mode each: they must go on serving and log the reason |
| :mod:`.drill`, :mod:`.vllm_drills`, :mod:`.sglang_drills` | the drills: one record for each |
| :mod:`.modes` | pairs of servers in vLLM's modes: graphs, drafts, prefix caching |
| :mod:`.trace` | a torch-profiler trace → microseconds a step of each part of the indexer |
| :mod:`.side` | runs inside every server: random weights, faults, status, rows |
| :mod:`.vllm_side`, :mod:`.sglang_side`, :mod:`.tokenspeed_side` | load it into an engine |
| :mod:`.tokenspeed_front` | an HTTP server around TokenSpeed's ``Engine`` |

``examples/make_tiny_v4.py``, ``make_tiny_v41.py`` and ``make_tiny_v32.py`` write the models.
:mod:`benchmarks.tables.server` writes the tables of docs/development/vllm.md. The modules import no
engine and need no torch in their own process, except the sides, which run inside the server.
"""
