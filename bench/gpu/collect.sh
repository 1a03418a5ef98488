#!/usr/bin/env bash
# Put what run_bench.sh left in DIR into this checkout's results/, and build the report of that run.
#
#   bash bench/gpu/collect.sh DIR RUN
set -euo pipefail
dir=${1:?usage: collect.sh DIR RUN}; run=${2:?usage: collect.sh DIR RUN}
cat "$dir/$run".tar.gz.* | tar -C results -xzf -
${PYTHON:-python3} -m bench report "results/$run"
