"""``dsv4-plugin bench candidates``: the two-level indexer of DeepSeek-V4.1, layer by layer."""
