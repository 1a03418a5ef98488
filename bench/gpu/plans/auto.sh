#!/usr/bin/env bash
# What 2 GPUs are asked for in one session of 25 minutes (bench/gpu/session.sh), the most telling first:
#
#   1. GPU tests, while the first servers start; then kernel and expert times, while these wait
#   2. the profile h200-x2-auto over NVLink, and over the emulated link of 25 GB/s
#   3. another version of SGLang, if its bundle is there: a served rebalance in each of DeepEP's modes
#   4. what EPLB costs while it never rearranges, and with asynchronous rounds (profile h200-x2-idle)
#
# Seconds since $START at which each is over: ENDS="NVLINK EMULATED OTHER IDLE" (710 1290 1470 1600). REHEARSE=1: the
# same on the CPU. Steps that are missing in $CARRY are left out.
set -uo pipefail
read -r nvlink_end emulated_end other_end idle_end <<<"${ENDS:-710 1290 1470 1600}"
profile=${PROFILE:-h200-x2-auto} idle=${IDLE_PROFILE:-h200-x2-idle}
. bench/gpu/plans/common.sh

# Which arms: lists in $CARRY/arms and $CARRY/arms-emulated instead of the profile's.
[ ! -e "$CARRY/arms" ] || arms=(--arms "$(cat "$CARRY/arms")")
# Five servers of 24 layers need GPUs of 141 GB.
unpack "random:layers=8,hidden=4096,expert_width=640,heads=32,kv_heads=1"
serve_other() { # beside the servers of the last step, which start meanwhile and wait
    local other=$WORK/site-other mode port
    cp -al "$SITE" "$other"
    # What it has instead of ours, and the metadata of those; the files are shared, so none is written over.
    tar -tJf "$CARRY/other-site.tar.xz" | cut -d/ -f1 | sort -u | while read -r name; do
        rm -rf "${other:?}/$name" "$other/${name%%-*}"-*.dist-info
    done
    tar -C "$other" -xJf "$CARRY/other-site.tar.xz"
    export SITE=$other PYTHONPATH=
    . bench/gpu/env.sh
    "$python" -m sglang_eplb_affinity.patching apply
    "$python" -m compileall -qq -j 0 "$other/sglang"
    "$python" -c 'import sglang, sglang.srt.server_args; print("SGLang", sglang.__version__)'
    for mode in low_latency normal auto; do
        port=$((34000 + 200 * ${#mode}))
        (
            bounded "$other_end" "$python" -m bench.gpu.rebalance_check --mode $mode --rebalances 1 --seconds 60 \
                --work "$WORK/other-$mode" --out "$results/other-$mode.json" --port $port >"$results/other-$mode.log" 2>&1
            echo "$mode: exit code $?: $(tail -n 1 "$results/other-$mode.log" | cut -c 1-200)"
            mkdir -p "$results/other-$mode" && cp "$WORK/other-$mode"/servers/*.log "$results/other-$mode/"
        ) &
    done
    wait
}

go=$WORK/go; rm -f "$go"
measure "$profile-nvlink" nvlink "$nvlink_end" "$profile" --hold "$go" ${arms[@]+"${arms[@]}"} &
measuring=$!
if [ -z "${REHEARSE:-}" ]; then
    for step in "$CARRY"/steps/*.early.sh; do # what steps want compiled
        [ ! -e "$step" ] || CUDA_VISIBLE_DEVICES=1 bounded 150 bash "$step" >"$results/$(basename "$step").log" 2>&1 &
    done
    compile_experts 120
    bounded 200 "$python" -m pytest -q -m gpu -n 8 -p no:cacheprovider ${TESTS:-tests/device tests/rebalance \
        tests/bench/test_emulated_link.py} >"$results/tests.log" 2>&1
    say "tests: exit code $?: $(tail -n 1 "$results/tests.log")"
fi
# The servers wait, stopped, once they are ready.
until grep -qs 'ready; waiting for' "$results/$profile-nvlink.log" || ! kill -0 $measuring 2>/dev/null; do sleep 0.5; done
say "servers ready: $(grep -h 'ready after' "$results/$profile-nvlink.log")"
give_up() { # WHY: paid time is better spent after a look at the logs
    say "$1; the errors of the servers' logs:"
    grep -hE 'Error|Exception|CUDA' "$results/$profile-nvlink"/server/*.log | sort | uniq -c | sort -rn | head -n 12
    kill $measuring 2>/dev/null && wait $measuring
    exit 1
}
ready=$(sed -n 's/^side-by-side: \([0-9]*\) ready after.*/\1/p' "$results/$profile-nvlink.log")
[ "${ready:-0}" -ge "${FEWEST_SERVERS:-2}" ] || give_up "too few servers started"
# On a GPU each, side by side: $CARRY/steps/NAME.gpuN.sh (after NAME.early.sh, see above), in the root of this checkout, its results below $STEP_OUT.
steps=()
for gpu in 0 1; do
    (
        for step in "$CARRY"/steps/*.gpu$gpu.sh; do
            [ -e "$step" ] || continue
            name=$(basename "$step" .gpu$gpu.sh)
            mkdir -p "$results/$name"
            CUDA_VISIBLE_DEVICES=$gpu STEP_OUT=$results/$name bounded "${STEPS_END:-330}" bash "$step" \
                >"$results/$name/log" 2>&1
            say "$name: exit code $?"; tail -n 6 "$results/$name/log" | cut -c 1-200
        done
    ) &
    steps+=($!)
done
wait "${steps[@]}"
touch "$go"
wait $measuring
counted=$(grep '^b[0-9]' "$results/$profile-nvlink.log" | grep -vc VOID)
[ "$counted" -ge 6 ] || give_up "only $counted rows count"
emulated=$(cat "$CARRY/arms-emulated" "$CARRY/arms" 2>/dev/null | head -n 1)
measure "$profile-emulated25" emulated25 "$emulated_end" "$profile" ${emulated:+--arms "$emulated"} ${EMULATED_OPTIONS:-}
go=$WORK/go-idle; rm -f "$go"
measure "$idle" nvlink "$idle_end" "$idle" --loads decode --hold "$go" &
measuring=$!
if [ -e "$CARRY/other-site.tar.xz" ] && [ "$(left "$other_end")" -gt 60 ]; then
    say "another version of SGLang"
    serve_other 2>&1 | tee "$results/other.log"
fi
touch "$go"
wait $measuring
say "over"
