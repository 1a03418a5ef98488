#!/usr/bin/env bash
# Runs one after another, from the list in FILE: a line each, RUN LINK END PROFILE [OPTIONS of `python -m bench run`]; END:
# seconds since $START at which it is over. Lists for 2 GPUs and 26 minutes, beside this plan:
#
#   replicas.runs  full passes and requests over the emulated link of 25 GB/s and over NVLink, with few and many replicas;
#                  then decoding
#   table-nvlink.runs, table-emulated.runs  five batch sizes of requests: over NVLink, with a noise floor and Poisson
#                  arrivals, and over the emulated link, with many replicas too; a sitting each
#
#   bash bench/gpu/session.sh SECONDS bench/gpu/plans/runs.sh FILE
#
# Maps of `python -m bench maps` go into $CARRY/maps/RUN, or $CARRY/maps/LINK. REHEARSE=1: the same on the CPU.
set -uo pipefail
runs=$(cat "${1:?usage: runs.sh FILE}") || exit
. bench/gpu/plans/common.sh
unpack "random:layers=8,hidden=4096,expert_width=640,heads=32,kv_heads=1"
[ -n "${REHEARSE:-}" ] || compile_experts 150 &
while read -r run link end profile more; do
    # shellcheck disable=SC2086  # words
    measure "$run" "$link" "$end" "$profile" $more </dev/null
done <<<"$runs"
say "over"
