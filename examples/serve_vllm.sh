#!/usr/bin/env bash
# Serve DeepSeek-V4 with vLLM and the exact top-k of dsv4_plugin in its indexer.
#
#   pip install "vllm>=0.26" dsv4-plugin    # or: pip install .   in a checkout
#   MODEL=... TP=4 examples/serve_vllm.sh [more options of vllm serve]
#
# DSV4_PLUGIN=0 serves with vLLM's own code: the other side of an A/B (docs/ab.md). What engaged is
# one line of each worker: "dsv4 active in vLLM ...".
set -euo pipefail

dsv4-plugin doctor || true # says what is here and why not more; exit code 1 is not an error

exec vllm serve "${MODEL:-deepseek-ai/DeepSeek-V4-Flash}" --plugin dsv4 \
    --tensor-parallel-size "${TP:-4}" \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" \
    "$@"
