#!/usr/bin/env bash
# Pack SGLang 0.5.17, patched, with what it imports, for a GPU host that has no network but already has Python 3.12,
# PyTorch 2.11.0+cu130, Triton, numba and nvcc.
#
#   bench/gpu/bundle.sh OUT_DIR     writes OUT_DIR/site-{a,b}.tar.xz (together under 50 MiB, about 3 minutes on 2 cores)
#
# On the GPU host:  mkdir -p site && cat OUT_DIR/site-*.tar.xz | tar -C site -xJf - -i && . bench/gpu/env.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); root=$(cd "$here/../.." && pwd)
out=${1:?usage: bundle.sh OUT_DIR}; mkdir -p "$out"; out=$(cd "$out" && pwd)
work=${WORK:-$(mktemp -d)}; mkdir -p "$work/wheels"
python=${PYTHON:-python3}

tags=()
for tag in manylinux_2_39 manylinux_2_35 manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_26 \
           manylinux_2_17 manylinux2014 manylinux_2_5 manylinux1; do tags+=(--platform "${tag}_x86_64"); done
"$python" -m pip download -q --exists-action i --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --abi cp312 --abi abi3 --abi none "${tags[@]}" -d "$work/wheels" -r "$here/wheels.txt"

# Left out: what needs other hardware (sm100), other models (FlashMLA, multimodal), or a network.
rm -rf "$work/site"; mkdir -p "$work/site"
for wheel in "$work"/wheels/*.whl; do
    unzip -q -o "$wheel" -d "$work/site" -x '*/flash_ops.abi3.so' '*/flashmla_ops.abi3.so' '*/infllm_ops*' \
        '*/sm100/common_ops*' '*/libxgrammar.a' 'sglang/multimodal_gen/*' 'flashinfer/data/cutlass/*' \
        'flashinfer/data/cccl/*' 'torchao/_C_cutlass*' 'sglang/srt/grpc/_core*' 'sglang/srt/server/_core*' \
        'sglang/srt/multimodal/_core*' 'pycountry/locales/*' 'mistral_common/data/*' 'cutlass/*' 2>/dev/null || [ $? = 11 ]
done
mkdir -p "$work/site/mistral_common/data"
# Symbols go, except DeepGEMM's: stripped, its library crashes when its JIT compiles.
find "$work/site" -name '*.so*' -size +300k ! -path '*/deep_gemm/*' -exec strip --strip-unneeded {} + 2>/dev/null || true

PYTHONPATH="$work/site:$root" "$python" -m sglang_eplb_affinity.patching apply

# Two parts, for transports that limit one transfer.
cd "$work/site"
first=(sgl_kernel deep_ep deep_ep_cpp*.so deep_gemm flashinfer tvm_ffi)
tar -cf - "${first[@]}" | xz -T0 -9 >"$out/site-a.tar.xz"
exclude=(); for name in "${first[@]}"; do exclude+=(--exclude "./$name"); done
tar -cf - "${exclude[@]}" . | xz -T0 -9 >"$out/site-b.tar.xz"
ls -l "$out"
