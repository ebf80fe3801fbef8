#!/usr/bin/env bash
# Serve DeepSeek-V4 with vLLM and the exact top-k of dsv4_plugin in its indexer.
#
#   DSV4_BUILD_CUDA=1 pip install .    # in a checkout, beside vllm>=0.26
#   MODEL=... TP=4 examples/serve_vllm.sh [more options of vllm serve]
#
# DSV4_PLUGIN=0 serves with vLLM's own code: the other side of an A/B (docs/ab.md). Each worker logs
# one line that says what engaged: "dsv4 active in vLLM ...".
set -euo pipefail

# Shows what is installed and what is missing. Exit code 1 is no error; 2 is a wrong setting.
dsv4-plugin doctor || test $? -eq 1

exec vllm serve "${MODEL:-deepseek-ai/DeepSeek-V4-Flash}" --plugin dsv4 \
    --tensor-parallel-size "${TP:-4}" \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" \
    "$@"
