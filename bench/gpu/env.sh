# Source on the GPU host after unpacking the bundle into $SITE (default: ./site), from the root of this checkout.
export PYTHONPATH=${SITE:-$PWD/site}:$PWD${PYTHONPATH:+:$PYTHONPATH}
# DeepEP links NVSHMEM, which the CUDA 13 wheels of PyTorch bring along.
export LD_LIBRARY_PATH=$(python3 -c 'import nvidia.nvshmem as m; print(list(m.__path__)[0])')/lib:${LD_LIBRARY_PATH:-}
export NVSHMEM_REMOTE_TRANSPORT=none          # one host without InfiniBand: low-latency mode over NVLink only
export NVSHMEM_QP_DEPTH=8192                  # low-latency mode asserts depth >= 2 * (max dispatch tokens per rank + 1)
export SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1 # flashinfer's data folder is not in the bundle
export SGLANG_JIT_DEEPGEMM_PRECOMPILE=0       # compile GEMM shapes as they come; the full sweep takes minutes
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
