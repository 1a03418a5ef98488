# sourced as a plan: quiet passes with traces
set -uo pipefail
. bench/gpu/plans/common.sh
unpack "random:layers=8,hidden=4096,expert_width=640,heads=32,kv_heads=1"
compile_experts 200 &
bounded 330 "$python" -m bench.gpu.quiet_passes --out "$results/quiet.json" --rounds 6 --traces "$results/traces" --seconds 130 >"$results/quiet.log" 2>&1
say "quiet: exit code $?"
tail -n 40 "$results/quiet.log"
say over
