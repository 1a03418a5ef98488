# Source on the GPU host, in an order with env.sh that does not matter, from the root of this checkout; V2=FOLDER (what
# bench/gpu/bundle_v2.sh packed, unpacked) must be set. Then `v2 COMMAND...` runs it with DeepEP V2 and its NCCL.
for home in /usr/local/cuda /usr/local/cuda-13*; do # V2's compiler looks below it for more than nvcc
    [ -z "${CUDA_HOME:-}" ] && [ -x "$home/bin/nvcc" ] && export CUDA_HOME=$home
done
[ -e "$V2/libnccl_without_gin.so" ] ||
    "${CC:-gcc}" -shared -fPIC -O1 -o "$V2/libnccl_without_gin.so" bench/gpu/nccl_without_gin.c -ldl
v2() { # with NCCL 2.30 before PyTorch's own; one host, so without GPU-initiated networking
    # NVLink multicast stays off: it can put GPUs that others share out of service.
    env NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 NCCL_CUMEM_ENABLE=1 \
        PYTHONPATH="$V2/site:${PYTHONPATH:-$PWD}" LD_PRELOAD="$V2/libnccl_without_gin.so $V2/nccl/lib/libnccl.so.2" \
        EP_NCCL_ROOT_DIR="$V2/nccl" EP_SUPPRESS_NCCL_CHECK=1 EP_REUSE_NCCL_COMM=0 EP_DISABLE_GIN=1 \
        EP_JIT_CACHE_DIR="${EP_JIT_CACHE_DIR:-/tmp/deepep-jit}" "$@"
}
