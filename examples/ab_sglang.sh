#!/usr/bin/env bash
# SGLang without dsv4_plugin against SGLang with it: three starts of each, a table, JSON and a plot.
#
#   MODEL=... TP=4 OUT=results/ab examples/ab_sglang.sh [more options of dsv4-plugin ab]
#
# The plot needs matplotlib (pip install matplotlib). --dry-run shows the commands;
# docs/ab.md says how to read the results.
set -euo pipefail

tp="${TP:-4}"
out="${OUT:-ab-sglang-$(date +%Y%m%d-%H%M%S)}"

exec dsv4-plugin ab --engine sglang --model "${MODEL:-deepseek-ai/DeepSeek-V4-Flash}" \
    --out "$out" --plot "$out/ab.svg" --pairs "${PAIRS:-3}" --workers "$tp" \
    --serve-args="--tp-size $tp" \
    --workload in=65536,out=256,n=4,c=1 \
    --workload in=8192,out=256,n=64,c=16 \
    "$@"
