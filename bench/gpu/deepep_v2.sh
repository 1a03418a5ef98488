#!/usr/bin/env bash
# Measure DeepEP V2 (ElasticBuffer) beside V1's two modes on the 2 GPUs of this host, in about 150 s with all compiles.
#
#   bash bench/gpu/deepep_v2.sh FOLDER OUT      FOLDER: what bench/gpu/bundle_v2.sh packed, unpacked; OUT: for the results
#
# OUT/deepep-v2.json and OUT/deepep-v1.json are written while it runs. V2's kernels are compiled as they come, one after
# another, so that first a pair of processes for each size and type does the least that compiles all it needs.
set -uo pipefail
folder=$(cd "${1:?usage: deepep_v2.sh FOLDER OUT}" && pwd); out=${2:?usage: deepep_v2.sh FOLDER OUT}
mkdir -p "$out"; python=${PYTHON:-python3} began=$(date +%s)
say() { echo "== $(($(date +%s) - began)) s: $*"; }
# NVLink multicast stays off: it can put GPUs that others share out of service.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export NVSHMEM_REMOTE_TRANSPORT=none NVSHMEM_QP_DEPTH=8192 PYTHONUNBUFFERED=1
nvshmem=$("$python" -c 'import nvidia.nvshmem as m; print(list(m.__path__)[0])')/lib
export LD_LIBRARY_PATH=$nvshmem:${LD_LIBRARY_PATH:-} PYTHONPATH=$PWD V2=$folder
v2() { bash bench/gpu/v2.sh "$@"; }
last() { grep -vE '^\s*$' "$1" | tail -n "${2:-3}" | cut -c 1-300; }

say "does DeepEP V2 load?"
v2 timeout 60 "$python" - >"$out/load.log" 2>&1 <<'PYTHON'
import ctypes, torch
nccl = ctypes.CDLL("libnccl.so.2"); version = ctypes.c_int(); nccl.ncclGetVersion(ctypes.byref(version))
print("torch", torch.__version__, "NCCL", version.value, torch.cuda.get_device_name(0))
for name in ("ncclCommQueryProperties", "ncclGetLsaDevicePointer", "ncclDevCommCreate", "ncclCommWindowRegister"):
    print(name, "is there" if hasattr(nccl, name) else "IS MISSING")
import deep_ep
print("deep_ep", deep_ep.__file__, deep_ep.ElasticBuffer)
PYTHON
code=$?; last "$out/load.log" 8; say "load: exit code $code"
if [ $code = 0 ]; then
    export EP_BUFFER_DEBUG=1
    one() { # NAME SECONDS ARGUMENTS...
        local name=$1 seconds=$2; shift 2
        v2 timeout -k 5 $((seconds + 30)) "$python" -m bench.micro.deepep --sections v2 --seconds "$seconds" \
            --out "$out/$name.json" "$@" >"$out/$name.log" 2>&1
        echo "$name: exit code $?: $(last "$out/$name.log" 1)"
    }
    least=(--v2-tokens 8,8192 --warm-up 1 --iterations 4 --repeats 1)
    one first 30 --hidden 7168 --dtypes bf16 --v2-tokens 8 --warm-up 1 --iterations 4 --repeats 1
    say "the first point"; last "$out/first.log" 12
    unset EP_BUFFER_DEBUG
    if grep -q '"received_copies"' "$out/first.json"; then
        for hidden in ${HIDDEN:-7168 4096 2048}; do for dtype in fp8 bf16; do
            one "compile-$hidden-$dtype" "${COMPILE_SECONDS:-45}" --hidden "$hidden" --dtypes "$dtype" "${least[@]}" &
        done; done
        wait; say "compiled $(ls "${EP_JIT_CACHE_DIR:-/tmp/deepep-jit}"/cache | wc -l) kernels"
        one deepep-v2 "${V2_SECONDS:-50}"; last "$out/deepep-v2.log" 3
        say "V2: $(grep -c '"received_copies"' "$out/deepep-v2.json") points"
    else
        say "V2 does not measure; the errors:"; grep -hE 'Error|rror:|assert|NCCL WARN|failed' "$out/first.log" | sort | uniq -c | head -n 12
    fi
fi
PYTHONPATH=$folder/site1:$PWD timeout -k 5 $((${V1_SECONDS:-25} + 30)) "$python" -m bench.micro.deepep --sections low_latency,normal \
    --low-latency-tokens 128,8,32 --tokens 4096,1024,8192 --seconds "${V1_SECONDS:-25}" --out "$out/deepep-v1.json" >"$out/deepep-v1.log" 2>&1
say "V1: exit code $?, $(grep -c '"dispatch_us"' "$out/deepep-v1.json") points"; last "$out/deepep-v1.log" 3
