#!/usr/bin/env bash
# A measurement that takes longer than one call on a rented host may. The first call starts PLAN in the background, in a
# copy of this checkout; it and every later call wait for SECONDS or until PLAN is over, and leave in $OUT (default:
# ./out) what there is by then: results.tar.gz.* and, once it is over, requests.tar.* and compile caches, in parts of
# 15 MiB.
#
#   bash bench/gpu/session.sh SECONDS PLAN [ARGUMENTS]
#
# The folder .carry of this checkout is made known to the plan as $CARRY; what a later call has in its own is added.
# In it: the bundle (site-*.tar.xz), compile caches of an earlier sitting (caches*.tar.xz), `commit` (of this checkout).
# The plan writes below $WORK/results, and finds the time at which the session began in $START.
# MEASURED_SECONDS (1e9): none of the plan goes on after so many seconds of the session.
set -uo pipefail
seconds=${1:?usage: session.sh SECONDS PLAN [ARGUMENTS]}; shift
: "${1:?usage: session.sh SECONDS PLAN [ARGUMENTS]}"
out=${OUT:-$PWD/out}; mkdir -p "$out"
export WORK=${WORK:-/tmp/session} CARRY=${WORK:-/tmp/session}/carry
end=$(($(date +%s) + seconds))

mkdir -p "$CARRY" "$WORK/results"
# Moved into place when it is whole: the plan may be waiting for it.
for item in .carry/*; do
    name=$(basename "$item")
    [ -e "$item" ] && [ ! -e "$CARRY/$name" ] && cp -r "$item" "$CARRY/.$name.part" && mv "$CARRY/.$name.part" "$CARRY/$name"
done
if [ ! -e "$WORK/pid" ]; then
    mkdir -p "$WORK/checkout" && tar -cf - --exclude=./.carry --exclude=./.git --exclude="./.venv*" --exclude=./out . |
        tar -C "$WORK/checkout" -xf -
    START=$(date +%s); export START; echo "$START" >"$WORK/start"
    [ -e "$CARRY/commit" ] && { SOURCE_COMMIT=$(cat "$CARRY/commit"); export SOURCE_COMMIT; }
    (
        cd "$WORK/checkout" || exit
        # A session of its own, and none of this call's files open: it outlives the call.
        setsid nohup bash -c '"$@"; echo $? >"$WORK/done"' session timeout -k 20 "${MEASURED_SECONDS:-100000000}" \
            bash "$@" >"$WORK/results/plan.log" 2>&1 </dev/null &
        echo $! >"$WORK/pid"
    )
fi

pack() { # NAME TAR_OPTIONS...: into parts, replaced when they are whole
    local name=$1; shift
    mkdir -p "$WORK/parts" && rm -f "$WORK/parts/$name".*
    tar "$@" 2>/dev/null | split -b 15M - "$WORK/parts/$name."
    rm -f "$out/$name".*; mv "$WORK/parts/$name".* "$out/"
}
pack_results() {
    pack results.tar.gz -C "$WORK" --exclude=requests.npz --exclude=model --exclude=client.log -czf - results
}
ticks=0
while [ "$(date +%s)" -lt "$end" ] && [ ! -e "$WORK/done" ]; do
    sleep 1; ticks=$((ticks + 1))
    [ $((ticks % 30)) = 0 ] && pack_results
done
pack_results
if [ -e "$WORK/done" ]; then
    # What `bench reevaluate` computes rows from again.
    (cd "$WORK" && find results -name requests.npz) >"$WORK/requests.list"
    [ -s "$WORK/requests.list" ] && pack requests.tar -C "$WORK" -cf - -T "$WORK/requests.list"
    # Triton needs its binaries again, not what they were made from.
    pack caches.tar.xz -C "$HOME" --exclude='*.ttir' --exclude='*.ttgir' --exclude='*.llir' --exclude='*.ptx' \
        --exclude='*.source' --ignore-failed-read -I 'xz -T0 -4' -cf - .cache .triton
fi
echo "== $(($(date +%s) - $(cat "$WORK/start"))) s into the session, $([ -e "$WORK/done" ] && echo over || echo 'going on')"
tail -n "${SHOWN:-40}" "$WORK/results/plan.log" | cut -c 1-300
ls -l "$out"
