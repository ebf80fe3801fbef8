"""The cases in ``cases/`` run inside a vLLM release; ``test_releases.py`` starts them."""

collect_ignore = ["bench_client.py", "engine"]
