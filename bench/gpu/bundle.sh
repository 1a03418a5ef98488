#!/usr/bin/env bash
# Pack SGLang, patched, with what it imports, for a GPU host that has no network but already has Python 3.12,
# PyTorch 2.11.0+cu130, Triton, numba and nvcc. What SGLang needs beyond that is taken as new as PyTorch 2.11 allows.
#
#   bench/gpu/bundle.sh OUT_DIR [OTHER]   writes OUT_DIR/site-{a,b}.tar.xz (together under 50 MiB, about 3 minutes on
#                                         2 cores) with SGLang $SGLANG (0.5.17), and with OTHER, another version, what it
#                                         has instead of some of that: OUT_DIR/other-site.tar.xz
#
# On the GPU host:  mkdir -p site && cat OUT_DIR/site-*.tar.xz | tar -C site -xJf - -i && . bench/gpu/env.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); root=$(cd "$here/../.." && pwd)
out=${1:?usage: bundle.sh OUT_DIR [OTHER]}; mkdir -p "$out"; out=$(cd "$out" && pwd)
version=${SGLANG:-0.5.17} other=${2:-}
work=${WORK:-$(mktemp -d)}; mkdir -p "$work/wheels"
python=${PYTHON:-python3}

tags=()
for tag in manylinux_2_39 manylinux_2_35 manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_26 \
           manylinux_2_17 manylinux2014 manylinux_2_5 manylinux1; do tags+=(--platform "${tag}_x86_64"); done
download() { # DIR OPTIONS...: wheels for the host
    local to=$1; shift
    "$python" -m pip download -q --exists-action i --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --abi cp312 --abi abi3 --abi none "${tags[@]}" -d "$to" "$@"
}
unpack() { # SITE WHEELS...
    local site=$1 wheel; shift
    mkdir -p "$site"
    # Left out: what needs other hardware (sm100), other models (FlashMLA, multimodal), or a network.
    for wheel in "$@"; do
        unzip -q -o "$wheel" -d "$site" -x '*/flash_ops.abi3.so' '*/flashmla_ops.abi3.so' '*/infllm_ops*' \
            '*/sm100/common_ops*' '*/libxgrammar.a' 'sglang/multimodal_gen/*' 'flashinfer/data/cutlass/*' \
            'flashinfer/data/cccl/*' 'torchao/_C_cutlass*' 'sglang/srt/grpc/_core*' 'sglang/srt/server/_core*' \
            'sglang/srt/multimodal/_core*' 'sglang/srt/rust_extensions/*.so' \
            'flashinfer/data/csrc/cake_*' 'flashinfer/data/csrc/kda/*' 'flashinfer/data/csrc/gdn/*' \
            'flashinfer/data/csrc/fused_moe/*' 'flashinfer/data/csrc/alphamoe*' 'flashinfer/data/csrc/blackwell*' \
            'flashinfer/data/csrc/experimental/*' 'flashinfer/fused_moe/backends/*/artifacts/*' 'pycountry/locales/*' 'mistral_common/data/*' 'cutlass/*' 2>/dev/null || [ $? = 11 ]
    done
    # Symbols go, except DeepGEMM's: stripped, its library crashes when its JIT compiles.
    find "$site" -name '*.so*' -size +300k ! -path '*/deep_gemm/*' -exec strip --strip-unneeded {} + 2>/dev/null || true
}
pinned() { echo -r "$root/requirements/sglang-$1.txt" -r "$here/wheels-$1.txt"; } # what VERSION has of its own

rm -rf "$work/site"
download "$work/wheels" -r "$here/wheels.txt"
# shellcheck disable=SC2046
download "$work/wheels-$version" $(pinned "$version")
unpack "$work/site" "$work/wheels"/*.whl "$work/wheels-$version"/*.whl
mkdir -p "$work/site/mistral_common/data"
PYTHONPATH="$work/site:$root" "$python" -m sglang_eplb_affinity.patching apply

# Two parts, for transports that limit one transfer.
cd "$work/site"
first=(sgl_kernel deep_ep deep_ep_cpp*.so deep_gemm flashinfer tvm_ffi)
tar -cf - "${first[@]}" | xz -T0 -9 >"$out/site-a.tar.xz"
exclude=(); for name in "${first[@]}"; do exclude+=(--exclude "./$name"); done
tar -cf - "${exclude[@]}" . | xz -T0 -9 >"$out/site-b.tar.xz"

if [ -n "$other" ]; then
    rm -rf "$work/other"
    # shellcheck disable=SC2046
    download "$work/wheels-$other" $(pinned "$other")
    unpack "$work/other" "$work/wheels-$other"/*.whl
    tar -C "$work/other" -cf - . --transform 's,^\./,,' | xz -T0 -9 >"$out/other-site.tar.xz"
fi
ls -l "$out"
