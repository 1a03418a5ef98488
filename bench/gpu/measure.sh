#!/usr/bin/env bash
# Everything about what mapping, recording and rebalancing cost, on a host with two GPUs (or more: GPUS=N), in the
# environment of env.sh. Leaves one archive of results and, since cold compile caches cost minutes, one of those.
#
#   bash bench/gpu/measure.sh OUT_DIR GROUP...
#
# A group is one step, or several that begin at the same time: tests+check+h200-x2-idle. Its servers start and compile
# side by side; a step's measuring waits until the step before it is over, so nothing is timed beside anything else.
#
#   tests             the GPU tests
#   tuning            the fastest launch shape of the kernel for each rule and size
#   kernel            time of one layer, ours beside SGLang's path and an empty kernel
#   check             logits and weights over 50 rebalances, synchronous and --eplb-async
#   PROFILE           a profile of `python -m bench run`, such as h200-x2-idle, with OPTIONS; its servers fill the GPUs, so
#                     two of them do not go into one group
#
# Unpack the archive of caches of an earlier call into $HOME before this one.
#
# LIMIT (3600): seconds that all of it may take; no load goes on in the last 45 of them, and steps that still run then are
# ended. PORT (31700): the first of some hundred.
set -uo pipefail
out=${1:?usage: measure.sh OUT_DIR GROUP...}; shift
mkdir -p "$out"
work=${WORK:-/tmp/measure}; mkdir -p "$work"
gpus=${GPUS:-2}
export TORCHINDUCTOR_CACHE_DIR=$HOME/.cache/inductor NUMBA_CACHE_DIR=$HOME/.cache/numba
SECONDS=0; limit=${LIMIT:-3600}; end_at=$(($(date +%s) + limit - 45))
bounded() { timeout -k 5 $((limit - 20 - SECONDS)) "$@"; }

# Until a command succeeds, for five minutes at most.
await() { local tries=1500; until "$@" || ((--tries == 0)); do sleep 0.2; done; }
ready_or_over() { grep -qsE 'ready (\{|after)' "$work/$1.log" || [ -e "$work/$1.done" ]; }

run_step() { # NAME FILE: begin measuring when FILE is there (at once if it is empty)
    local hold=() port=$((${PORT:-31700} + 300 * number))
    [ -z "$2" ] || hold=(--hold "$2")
    case $1 in
        tests | tuning | kernel) # nothing to prepare
            [ -z "$2" ] || await [ -e "$2" ]
            # What times kernels waits for the group's servers, which keep the GPUs busy while they start.
            [ "$1" = tests ] || for other in ${group//+/ }; do
                case $other in tests | tuning | kernel) ;; *) await ready_or_over "$other" ;; esac
            done ;;
    esac
    case $1 in
        tests) timeout -k 10 150 python3 -m pytest -q -m gpu -n 12 -p no:cacheprovider \
            ${TESTS:-tests/device tests/rebalance tests/bench/test_emulated_link.py} ;;
        tuning)
            CUDA_VISIBLE_DEVICES=0 bounded python3 -m bench.gpu.kernel_tuning --rule cover \
                --out "$work/tuning-cover.json" & local cover=$!
            CUDA_VISIBLE_DEVICES=1 bounded python3 -m bench.gpu.kernel_tuning --rule static --rule dynamic \
                --out "$work/tuning-items.json"
            wait $cover ;;
        kernel) bounded python3 -m bench.gpu.kernel_times --gpus "$gpus" --out "$work/kernel.json" ;;
        check) bounded python3 -m bench.gpu.rebalance_check --out "$work/check.json" --gpus "$gpus" \
            --work "$work/check" --seconds "${CHECK_SECONDS:-60}" --end-at $end_at --port $port "${hold[@]}" ;;
        *) bounded python3 -m bench run --profile "$1" --run "$1" --results-dir "$work/results" --no-report --port $port \
            --seconds $((limit - 45 - SECONDS)) "${hold[@]}" ${OPTIONS:-} ;;
    esac
}

failed=0
for group in "$@"; do
    previous=""; number=0; pids=()
    for name in ${group//+/ }; do
        rm -f "$work/$name.done"
        (
            run_step "$name" "$previous" >"$work/$name.log" 2>&1; code=$?
            touch "$work/$name.done"
            echo "== $name: exit code $code after $SECONDS s"; tail -n "${SHOWN:-12}" "$work/$name.log" | cut -c 1-400
            exit $code
        ) &
        pids+=($!); previous="$work/$name.done"; number=$((number + 1))
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    # Models are made again by a command; logs of servers are long.
    (cd "$work" && find . \( -name '*.json' -o -name '*.jsonl' -o -name '*.log' \) -not -path '*/model/*' -print0 |
        tar -czf "$out/results.tar.gz" --null -T -)
done
# Triton needs its binaries again, not what they were made from.
(cd "$HOME" && tar --exclude='*.ttir' --exclude='*.ttgir' --exclude='*.llir' --exclude='*.ptx' --exclude='*.source' \
    -cf - --ignore-failed-read .cache .triton 2>/dev/null | xz -T0 -6 >"$out/caches.tar.xz")
ls -l "$out"
exit $failed
