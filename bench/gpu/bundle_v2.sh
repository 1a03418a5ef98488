#!/usr/bin/env bash
# Pack what bench/gpu/deepep_v2.sh needs on a GPU host without a network (Python 3.12, PyTorch 2.11.0+cu130, nvcc):
#
#   bench/gpu/bundle_v2.sh OUT_DIR        writes OUT_DIR/deepep-v2.tar.xz (48 MiB, about 3 minutes on 2 cores)
#
# v2/site: DeepEP V2 (tokenspeed-deepep 2.0.0: all its torch symbols are in 2.11; 2.1.0 misses one), v2/site1: V1,
# v2/nccl: the NCCL that V2 was compiled with (2.30.4; the device communicator's layout is that version's), sm_90 only.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd); mkdir -p "${1:?usage: bundle_v2.sh OUT_DIR}"; out=$(cd "$1" && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; python=${PYTHON:-python3}
tags=(); for tag in manylinux_2_28 manylinux_2_18 manylinux_2_17 manylinux2014; do tags+=(--platform "${tag}_x86_64"); done
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 \
    --abi none "${tags[@]}" -d "$work/v2.0" tokenspeed-deepep==2.0.0.post20260430 nvidia-nccl-cu13==2.30.4
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 \
    --abi none "${tags[@]}" -d "$work/v1" tokenspeed-deepep==1.2.1.post20251110
unzip -q "$work"/v2.0/tokenspeed_deepep-*.whl -d "$work/v2/site"
unzip -q "$work"/v1/*.whl -d "$work/v2/site1"
unzip -q "$work"/v2.0/nvidia_nccl*.whl -d "$work/nccl"
mkdir -p "$work/v2/nccl/lib" && cp -r "$work/nccl/nvidia/nccl/include" "$work/v2/nccl/"
(cd "$root" && "$python" -m bench.gpu.trim_fatbin "$work/nccl/nvidia/nccl/lib/libnccl.so.2" "$work/v2/nccl/lib/libnccl.so.2")
find "$work/v2" -name '*.so' -exec strip --strip-unneeded {} +
tar -C "$work" -cf - v2 | xz -T0 -6 >"$out/deepep-v2.tar.xz"
ls -l "$out/deepep-v2.tar.xz"
