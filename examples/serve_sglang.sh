#!/usr/bin/env bash
# Serve DeepSeek-V4 with SGLang and the exact top-k of dsv4_plugin in its indexer.
#
#   pip install "sglang>=0.5.16" dsv4-plugin    # or: pip install .   in a checkout
#   MODEL=... TP=4 examples/serve_sglang.sh [more options of sglang serve]
#
# TOPK=off serves with SGLang's own top-k: the other side of an A/B (docs/ab.md). What engaged
# is one line of each scheduler process: "dsv4 active in SGLang ...".
set -euo pipefail

dsv4-plugin doctor || true # says what is here and why not more; exit code 1 is not an error

exec sglang serve --model-path "${MODEL:-deepseek-ai/DeepSeek-V4-Flash}" \
    --tp-size "${TP:-4}" \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-30000}" \
    --dsv4-topk "${TOPK:-auto}" \
    "$@"
