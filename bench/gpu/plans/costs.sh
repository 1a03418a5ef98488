#!/usr/bin/env bash
# What 2 GPUs are asked for about noise and costs in one session of 25 minutes (bench/gpu/session.sh):
#
#   1. the noise floor: two servers of one arm beside a third, closed loop, Poisson arrivals ($RATE a second, 120), and
#      full prefill passes (h200-x2-floor)
#   2. what EPLB costs while it never rearranges, and --eplb-async at the default interval: decoding (h200-x2-idle)
#   3. rebalances every 100 passes, SGLang's and asynchronous (h200-x2-stall)
#   4. what EPLB costs in normal mode (h200-x2-idle-normal)
#
# Back here: bench/gpu/collect.sh, then `python -m bench summary from-run results/RUN --output FILE`.
#
# Seconds since $START at which each is over: ENDS="FLOOR IDLE STALL NORMAL" (560 860 1130 1480). REHEARSE=1: the same on
# the CPU.
set -uo pipefail
read -r floor idle stall normal <<<"${ENDS:-560 860 1130 1480}"
. bench/gpu/plans/common.sh
unpack "random:layers=8,hidden=4096,expert_width=640,heads=32,kv_heads=1"
measure h200-x2-floor nvlink "$floor" h200-x2-floor --rate "${RATE:-120}" --loads main,poisson,prefill
measure h200-x2-idle nvlink "$idle" h200-x2-idle --loads decode --blocks 5
measure h200-x2-stall nvlink "$stall" h200-x2-stall --loads decode --blocks 4
measure h200-x2-idle-normal nvlink "$normal" h200-x2-idle-normal --blocks 4
say "over"
