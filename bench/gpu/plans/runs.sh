#!/usr/bin/env bash
# Runs one after another, a line each in $CARRY/runs: RUN LINK END PROFILE [OPTIONS of `python -m bench run`]; END: seconds
# since $START at which it is over. Without that file, what many replicas are worth on 2 GPUs in 25 minutes: decoding at
# few and many tokens a GPU over NVLink, with one active slot an expert and with several; then requests and full passes over
# the emulated link of 25 GB/s.
#
# Maps of `python -m bench maps` go into $CARRY/maps/LINK. REHEARSE=1: the same on the CPU.
set -uo pipefail
. bench/gpu/plans/common.sh
unpack "random:layers=8,hidden=4096,expert_width=640,heads=32,kv_heads=1"
if [ -e "$CARRY/runs" ]; then runs=$(cat "$CARRY/runs"); else
    runs="x2-replicas-nvlink nvlink 760 h200-x2-auto --arms vanilla,affinity,primary,primary-32 --loads decode:16:512 --blocks 5
x2-replicas-emulated25 emulated25 1480 h200-x2-auto --arms vanilla,cover-32,primary,primary-32 --loads main,prefill --blocks 5"
fi
while read -r run link end profile options; do
    # shellcheck disable=SC2086  # options are words
    measure "$run" "$link" "$end" "$profile" $options </dev/null
done <<<"$runs"
say "over"
