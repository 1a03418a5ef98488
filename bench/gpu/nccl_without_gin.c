/* Lets DeepEP V2 builds from before DeepEP PR 630 open a buffer on one host without GPU-initiated networking (GIN).
 *
 * They refuse a communicator that has none, even with EP_DISABLE_GIN=1, which then asks for none: nothing but that check
 * reads the type that is answered here. Preloaded before NCCL by bench/gpu/v2.sh; the structure is NCCL 2.30's.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>

enum gin_type { GIN_NONE = 0, GIN_PROXY = 2 };

struct properties {
    size_t size;
    unsigned int magic, version;
    int rank, ranks, cuda_device, nvml_device;
    bool device_api, multimem;
    enum gin_type gin;
    int lsa_teams;
    bool host_rma;
    enum gin_type railed_gin;
};

int ncclCommQueryProperties(void *communicator, struct properties *found) {
    int (*original)(void *, struct properties *) = dlsym(RTLD_NEXT, "ncclCommQueryProperties");
    int code = original ? original(communicator, found) : 3; /* ncclInternalError */
    if (code == 0 && found->gin == GIN_NONE) found->gin = found->railed_gin = GIN_PROXY;
    return code;
}
