#!/usr/bin/env bash
# One sitting of the benchmark on a rented GPU host, in one call: from the root of this checkout, after unpack.sh.
#
#   bash bench/gpu/run_bench.sh LINK SECONDS [OPTIONS of `python -m bench run`]      LINK: nvlink, emulated50, emulated25
#
# The servers start, warm up and are measured until SECONDS are over or all blocks are there; rows are kept as they come.
# The same call goes on where the last one stopped, if results/RUN of that one is in this checkout (collect.sh puts it
# there). Nothing is drawn here. Leaves RUN.tar.gz in parts of 15 MiB in $OUT (default: ./out).
#
# PROFILE (h200-x2), RUN (PROFILE-LINK), SOURCE_COMMIT (the commit of this checkout, where it has no .git),
# KEEP_REQUESTS=1 (bring every request's times back too, some MB a row).
set -uo pipefail
link=${1:?usage: run_bench.sh LINK SECONDS [OPTIONS]}; seconds=${2:?usage: run_bench.sh LINK SECONDS [OPTIONS]}; shift 2
profile=${PROFILE:-h200-x2}; run=${RUN:-$profile-$link}; out=${OUT:-$PWD/out}
mkdir -p "$out"
. bench/gpu/env.sh
python3 -m bench run --profile "$profile" --link "$link" --run "$run" --seconds "$seconds" --no-report "$@"
code=$?
[ -d "results/$run" ] || exit "$code"
left_out=(--exclude "$run/warm-up"); [ -n "${KEEP_REQUESTS:-}" ] || left_out+=(--exclude requests.npz)
tar -C results -czf - "${left_out[@]}" "$run" | split -b 15M - "$out/$run.tar.gz."
ls -l "$out"
# 1: some rows are void; 130: out of time. Both have brought rows.
case $code in 0 | 1 | 130) exit 0 ;; *) exit "$code" ;; esac
