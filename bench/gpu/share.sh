#!/usr/bin/env bash
# Run COMMAND on one share of this host: share PART (from 0) of PARTS has its own GPUs and its own cores, as many as the
# others. Two measurements on 2 GPUs each then take one host with 4 for half of the time; the results say so
# ("2 x ... (of 4 in the host)"). Give each its own ports, folders and output.
#
#   bash bench/gpu/share.sh PART PARTS COMMAND...
set -euo pipefail
part=${1:?usage: share.sh PART PARTS COMMAND...}; parts=${2:?usage: share.sh PART PARTS COMMAND...}; shift 2
all=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}
# Neighbouring numbers are one socket's, and hyper-threads of one core on virtual machines.
read -r gpus cores < <(python3 -c '
import os, sys
part, parts = map(int, sys.argv[1:3])
for items in (list(filter(None, sys.argv[3].split(","))), sorted(os.sched_getaffinity(0))):
    each = len(items) // parts
    print(",".join(map(str, items[part * each : (part + 1) * each])) or "-", end=" ")
' "$part" "$parts" "$all"; echo)
if [ "$gpus" = - ] || [ "$cores" = - ]; then
    echo "error: share.sh: share $part of $parts is empty: the host has GPUs '$all' and $(nproc) cores" >&2; exit 2
fi
CUDA_VISIBLE_DEVICES=$gpus exec taskset -c "$cores" "$@"
