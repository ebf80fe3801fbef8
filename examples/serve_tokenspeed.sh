#!/usr/bin/env bash
# Serve DeepSeek-V4 with TokenSpeed and the kernels of dsv4_plugin in its indexer.
#
#   DSV4_BUILD_CUDA=1 pip install .    # in a checkout, beside tokenspeed>=0.1.1
#   MODEL=... TP=4 examples/serve_tokenspeed.sh [more options of tokenspeed serve]
#
# A plugin cannot add options to TokenSpeed, so the environment has the switch: DSV4_PLUGIN=0 serves
# with TokenSpeed's own kernels (docs/tokenspeed.md). Each worker logs one line for each mode that
# says what engaged: "dsv4 active in TokenSpeed ...".
set -euo pipefail

export DSV4_PLUGIN="${DSV4_PLUGIN:-1}" DSV4_TOPK="${DSV4_TOPK:-auto}"

# Shows what is installed and what is missing. Exit code 1 is no error; 2 is a wrong setting.
dsv4-plugin doctor || test $? -eq 1

exec tokenspeed serve --model "${MODEL:-deepseek-ai/DeepSeek-V4-Flash}" \
    --tensor-parallel-size "${TP:-4}" \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" \
    "$@"
