#!/usr/bin/env bash
# What 4 GPUs are asked for in one session of 25 minutes (bench/gpu/session.sh): the profile h200-x4-auto over NVLink,
# and with each half of the GPUs as a node behind an emulated link of 25 GB/s. No EPLB, vanilla, affinity with 8
# redundant experts, and with 32 under cover_balanced; 64, 256 and 2048 concurrent, full passes, decoding; 3 blocks.
#
# Before: `python -m bench.calibration.predict --profile h200-x4-auto [--link emulated25]`, which is kept beside the runs.
# Maps that `python -m bench maps` planned go into $CARRY/maps/LINK; without them the run plans them while servers wait.
#
# Seconds since $START at which each is over: ENDS="NVLINK EMULATED" (760 1480). REHEARSE=1: the same on the CPU.
set -uo pipefail
read -r nvlink emulated <<<"${ENDS:-760 1480}"
. bench/gpu/plans/common.sh
unpack "random:layers=8,hidden=4096,expert_width=1280,heads=32,kv_heads=1"
measure h200-x4-auto-nvlink nvlink "$nvlink" h200-x4-auto
measure h200-x4-auto-emulated25 emulated25 "$emulated" h200-x4-auto
say "over"
