#!/usr/bin/env bash
# Runs one after another, a line each in $CARRY/runs: RUN LINK END PROFILE [OPTIONS of `python -m bench run`]; END: seconds
# since $START at which it is over. Without that file, what replicas are worth on 2 GPUs in 28 minutes: full passes and
# requests over the emulated link of 25 GB/s and over NVLink, then decoding, in low-latency mode alone and in auto mode.
#
# Maps of `python -m bench maps` go into $CARRY/maps/RUN, or $CARRY/maps/LINK. REHEARSE=1: the same on the CPU.
set -uo pipefail
. bench/gpu/plans/common.sh
unpack "random:layers=8,hidden=4096,expert_width=640,heads=32,kv_heads=1"
if [ -e "$CARRY/runs" ]; then runs=$(cat "$CARRY/runs"); else
    runs="h200-x2-replicas-emulated25 emulated25 560 h200-x2-replicas --loads main,prefill
h200-x2-replicas-nvlink nvlink 980 h200-x2-replicas --loads main,prefill
h200-x2-low-latency nvlink 1360 h200-x2-low-latency --loads decode
h200-x2-decode nvlink 1680 h200-x2-decode --loads decode"
fi
while read -r run link end profile more; do
    # shellcheck disable=SC2086  # words
    measure "$run" "$link" "$end" "$profile" $more </dev/null
done <<<"$runs"
say "over"
