#!/usr/bin/env bash
# On the GPU host, from the root of this checkout: unpack the parts of bundle.sh that are in DIR into $SITE
# (default: ./site), and once both are there put this checkout's patch series on it. May be called once per part.
#
#   bash bench/gpu/unpack.sh DIR
set -euo pipefail
site=${SITE:-$PWD/site}; mkdir -p "$site"
for part in "${1:?usage: unpack.sh DIR}"/site-*.tar.xz; do
    [ -e "$part" ] && tar -C "$site" -xJf "$part"
done
if [ -d "$site/sgl_kernel" ] && [ -d "$site/sglang" ]; then
    export PYTHONPATH="$site:$PWD"
    python3 -m sglang_eplb_affinity.patching unapply >/dev/null
    python3 -m sglang_eplb_affinity.patching apply
    # Each server is several processes that import thousands of files; where Python writes no byte code (as in many
    # containers), each of them would compile all of them.
    python3 -m compileall -qq -j 0 "$site" || true
fi
