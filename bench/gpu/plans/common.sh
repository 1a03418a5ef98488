# Sourced by the plans of bench/gpu/session.sh, in the root of a checkout: what they all do.
#
# $WORK, $CARRY and $START are the session's. REHEARSE=1: the same steps on the CPU. BENCH_OPTIONS: for every run.
results=$WORK/results python=${PYTHON:-python3}
options=(--no-report --results-dir "$results" ${BENCH_OPTIONS:-})
left() { echo $((START + $1 - $(date +%s))); }
say() { echo "== $(($(date +%s) - START)) s: $*"; }
bounded() { local end=$1; shift; timeout -k 15 "$(left "$end")" "$@"; } # none of it goes on after END

unpack() { # SMALLER_MODEL: for GPUs that do not hold the plan's servers
    say "unpacking"
    [ -z "${REHEARSE:-}" ] || { options+=(--rehearse); return; }
    export SITE=$WORK/site
    (cd "$HOME" && for archive in "$CARRY"/caches*.tar.xz; do [ -e "$archive" ] && tar -xJf "$archive"; done)
    bash bench/gpu/unpack.sh "$CARRY" >"$results/unpack.log" 2>&1 || say "unpack.sh: exit code $?"
    tail -n 2 "$results/unpack.log"
    . bench/gpu/env.sh
    export NUMBA_CACHE_DIR=$HOME/.cache/numba TORCHINDUCTOR_CACHE_DIR=$HOME/.cache/inductor
    { date; nvidia-smi; nvidia-smi topo -m; lscpu; "$python" -m pip list; } >"$results/host.txt" 2>&1
    gib=$("$python" -c 'import torch; print(round(torch.cuda.get_device_properties(0).total_memory / 2**30))')
    [ "$gib" -gt 120 ] || options+=(--model "$1")
    say "GPUs of $gib GiB"
}
compile_experts() { # END: before the servers get there, which compile one kernel after another, all of them the same
    bounded "$1" "$python" -m bench.gpu.precompile_experts --slots 32,36,48 --hidden 4096 --width 640 \
        --batches 8,32,64,128,256 >"$results/precompile.log" 2>&1
    say "experts' kernels: exit code $?, $(grep -c ': there' "$results/precompile.log") of $(wc -l <"$results/precompile.log")"
}
place_maps() { # RUN LINK: those that were planned before, for this run or for any on that link
    local maps=$CARRY/maps/$1
    [ -d "$maps" ] || maps=$CARRY/maps/$2
    [ -d "$maps" ] && mkdir -p "$results/$1/maps" && cp "$maps"/*.json "$results/$1/maps/"
}
measure() { # RUN LINK END PROFILE [OPTIONS]
    local run=$1 link=$2 end=$3 of=$4; shift 4
    [ "$(left "$end")" -gt 60 ] || { say "no time for $run"; return; }
    place_maps "$run" "$link"
    [ -z "${REHEARSE:-}" ] || link="" # the CPU engine has no link to emulate
    bounded "$((end + 15))" "$python" -m bench run --profile "$of" --run "$run" --link "$link" \
        --seconds "$(left "$end")" "${options[@]}" "$@" >"$results/$run.log" 2>&1
    say "$run: exit code $? ($(grep -c '^b[0-9]' "$results/$run.log") rows, $(grep -c VOID "$results/$run.log") void)"
}
