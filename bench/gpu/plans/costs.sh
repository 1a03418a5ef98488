#!/usr/bin/env bash
# What 2 GPUs are asked for about costs in one session of 25 minutes (bench/gpu/session.sh):
#
#   1. what EPLB costs while it never rearranges, and --eplb-async at the default interval: decoding (h200-x2-idle)
#   2. rebalances every 100 passes, SGLang's and asynchronous (h200-x2-stall); `python -m bench.figures.round_steps` says
#      of its logs in which phase of a round steps are longer
#   3. what EPLB costs in normal mode (h200-x2-idle-normal)
#   4. what each measure against noise gives, one at a time (bench.gpu.quiet_passes)
#
# Back here: bench/gpu/collect.sh, then `python -m bench summary from-run results/RUN --output FILE`.
#
# Seconds since $START at which each is over: ENDS="IDLE STALL NORMAL QUIET" (470 800 1180 1450). REHEARSE=1: the same
# on the CPU.
set -uo pipefail
read -r idle stall normal quiet <<<"${ENDS:-470 800 1180 1450}"
. bench/gpu/plans/common.sh
unpack "random:layers=8,hidden=4096,expert_width=640,heads=32,kv_heads=1"
measure h200-x2-idle nvlink "$idle" h200-x2-idle --loads decode --blocks 5
measure h200-x2-stall nvlink "$stall" h200-x2-stall --loads decode --blocks 4
measure h200-x2-idle-normal nvlink "$normal" h200-x2-idle-normal --blocks 4
if [ "$(left "$quiet")" -gt 60 ]; then
    bounded "$((quiet + 15))" "$python" -m bench.gpu.quiet_passes --out "$results/quiet-passes.json" --seconds 100 \
        ${REHEARSE:+--cpu} >"$results/quiet-passes.log" 2>&1
    say "quiet_passes: exit code $?"
fi
say "over"
