#!/usr/bin/env bash
# Run COMMAND with DeepEP V2 and its NCCL on a GPU host: bash bench/gpu/v2.sh COMMAND...   (after env.sh, where SGLang is
# to be served), from the root of this checkout. V2=FOLDER: what bench/gpu/bundle_v2.sh packed, unpacked.
set -euo pipefail
folder=${V2:?V2 must name the folder of bundle_v2.sh}
for home in /usr/local/cuda /usr/local/cuda-13*; do # V2's compiler looks below it for more than nvcc
    [ -z "${CUDA_HOME:-}" ] && [ -x "$home/bin/nvcc" ] && export CUDA_HOME=$home
done
[ -e "$folder/libnccl_without_gin.so" ] || {
    "${CC:-gcc}" -shared -fPIC -O1 -o "$folder/gin.$$.so" bench/gpu/nccl_without_gin.c -ldl
    mv "$folder/gin.$$.so" "$folder/libnccl_without_gin.so"
}
# NCCL 2.30 before PyTorch's own; one host, so without GPU-initiated networking. NVLink multicast stays off: it can put
# GPUs that others share out of service.
exec env NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 NCCL_CUMEM_ENABLE=1 \
    PYTHONPATH="$folder/site:${PYTHONPATH:-$PWD}" LD_PRELOAD="$folder/libnccl_without_gin.so $folder/nccl/lib/libnccl.so.2" \
    EP_NCCL_ROOT_DIR="$folder/nccl" EP_SUPPRESS_NCCL_CHECK=1 EP_REUSE_NCCL_COMM=0 EP_DISABLE_GIN=1 \
    EP_JIT_CACHE_DIR="${EP_JIT_CACHE_DIR:-/tmp/deepep-jit}" "$@"
