#!/usr/bin/env bash
# On the GPU host, in the environment of env.sh: everything about the cost of mapping, recording and EPLB, and one small
# archive of results.
#
#   bash bench/gpu/overhead.sh OUT_DIR     (GROUPS_WANTED=large.normal,small SECONDS_EACH=200 STEPS="tests kernel check serve")
#
# STEPS may also name tuning: the fastest launch shape of the kernel at each size.
# Each step has its own time limit and writes what it has, so a run that is cut short keeps the steps before.
set -uo pipefail
out=${1:?usage: overhead.sh OUT_DIR}; mkdir -p "$out"
work=${WORK:-/tmp/overhead}; mkdir -p "$work"
groups=${GROUPS_WANTED:-large.normal,large.low_latency,small}
steps=${STEPS:-tests kernel check serve}
failed=0
step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2; shift 2
    [[ " $steps " == *" $name "* ]] || return 0
    echo "== $name"
    timeout -k 10 "$limit" "$@" 2>&1 | tee "$work/$name.log" | tail -n "${SHOWN:-30}" || { echo "== $name FAILED"; failed=1; }
    tar -czf "$out/results.tar.gz" -C "$work" $(cd "$work" && ls -- *.json *.log overhead/*.json 2>/dev/null)
}
step tests 240 python3 -m pytest -q -m gpu tests/kernel -p no:cacheprovider
step tuning 150 python3 -m bench.gpu.kernel_tuning --out "$work/kernel-tuning.json"
step kernel 400 python3 -m bench.gpu.kernel_times --out "$work/kernel.json"
step check 500 python3 -m bench.gpu.rebalance_check --out "$work/rebalance-check.json"
step serve 3500 python3 -m bench.gpu.overhead --out "$work/overhead" --groups "$groups" --seconds "${SECONDS_EACH:-600}" \
    ${SERVE_OPTIONS:-}
ls -l "$out"
exit $failed
