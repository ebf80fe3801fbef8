#!/usr/bin/env bash
# Serve DeepSeek-V4 with SGLang and the exact top-k of dsv4_plugin in its indexer.
#
#   DSV4_BUILD_CUDA=1 pip install .    # in a checkout, beside sglang>=0.5.16
#   MODEL=... TP=4 examples/serve_sglang.sh [more options of sglang serve]
#
# TOPK=off serves with SGLang's own top-k: the other side of an A/B (docs/ab.md). Each scheduler
# process logs one line that says what engaged: "dsv4 active in SGLang ...".
set -euo pipefail

# Shows what is installed and what is missing. Exit code 1 is no error; 2 is a wrong setting.
dsv4-plugin doctor || test $? -eq 1

exec sglang serve --model-path "${MODEL:-deepseek-ai/DeepSeek-V4-Flash}" \
    --tp-size "${TP:-4}" \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-30000}" \
    --dsv4-topk "${TOPK:-auto}" \
    "$@"
