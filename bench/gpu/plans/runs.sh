#!/usr/bin/env bash
# Runs one after another, from the list in FILE: a line each, RUN LINK END PROFILE [OPTIONS of `python -m bench run`]; END:
# seconds since $START at which it is over. Lists for 2 GPUs and 26 minutes, beside this plan:
#
#   replicas.runs  full passes and requests over the emulated link of 25 GB/s and over NVLink, with few and many replicas;
#                  then decoding
#   table.runs     a decode server (low-latency mode alone); then five batch sizes of requests, with a noise floor
#
#   bash bench/gpu/session.sh SECONDS bench/gpu/plans/runs.sh FILE
#
# Maps of `python -m bench maps` go into $CARRY/maps/RUN, or $CARRY/maps/LINK. REHEARSE=1: the same on the CPU.
set -uo pipefail
runs=$(cat "${1:?usage: runs.sh FILE}") || exit
. bench/gpu/plans/common.sh
unpack "random:layers=8,hidden=4096,expert_width=640,heads=32,kv_heads=1"
if [ -z "${REHEARSE:-}" ]; then # before the servers get there: each compiles one kernel after another, all of them the same
    bounded 150 "$python" -m bench.gpu.precompile_experts --slots 32,36,48 --hidden 4096 --width 640 \
        --batches 8,32,64,128,256 >"$results/precompile.log" 2>&1 &
fi
while read -r run link end profile more; do
    # shellcheck disable=SC2086  # words
    measure "$run" "$link" "$end" "$profile" $more </dev/null
done <<<"$runs"
say "over"
