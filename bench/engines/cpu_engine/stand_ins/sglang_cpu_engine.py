"""What SGLang's CPU engine lacks for expert parallelism, data-parallel attention, DeepSeek models and disaggregation.

SGLang loads this in every process through its plugin entry points. Faults that concern EPLB itself are mended in the
patch series, not here.
"""

import logging

logger = logging.getLogger(__name__)


def moe_forward_native(layer, x, topk_output, moe_runner_config):
    """Replaces sglang.srt.layers.moe.fused_moe_native.moe_forward_native, which fails on the ids of -1 that SGLang's
    dispatcher writes for experts of other ranks. Sums in float32 in the order of slots."""
    import torch
    from torch.nn import functional

    assert moe_runner_config.activation == "silu" and moe_runner_config.gemm1_alpha is None
    assert not moe_runner_config.apply_router_weight_on_input
    weights, ids = topk_output.topk_weights, topk_output.topk_ids
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in torch.unique(ids).tolist():
        if expert < 0:
            continue
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(x[token], layer.w13_weight[expert]).chunk(2, dim=-1)
        y = functional.linear(functional.silu(gate) * up, layer.w2_weight[expert])
        out.index_add_(0, token, y.float() * weights[token, slot].float().unsqueeze(-1))
    return out.to(x.dtype)


def _replace_native_moe():
    import sglang.srt.layers.moe.fused_moe_native as module

    module.moe_forward_native = moe_forward_native


def _register_mla_handler():
    # attention_backend_handler.py has none for torch_native; its fallback computes prefill without the latent cache
    # that torch_native reads.
    from sglang.srt.models.deepseek_common import attention_backend_handler as module

    module.AttentionBackendRegistry.register(
        "torch_native", lambda attention, batch: module._dispatch_mla_subtype(attention, batch)
    )


def _complete_dp_attention():
    import sglang.srt.layers.dp_attention as dp_attention
    import torch
    import torch.distributed as dist
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    # Padded batches ask the attention backend for a filling (forward_batch_info.py).
    TorchNativeAttnBackend.get_cuda_graph_seq_len_fill_value = lambda self: 1
    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1  # its name in 0.5.23

    # forward_batch_info.py asks for pinned memory whatever the device.
    make_tensor = torch.tensor
    torch.tensor = lambda *args, pin_memory=False, **kwargs: make_tensor(*args, **kwargs)

    def memcpy(dst, src, dim, offset, sz, offset_src):
        """dp_attention.memcpy_triton without Triton."""
        assert dim == 0
        start, length = int(offset), int(sz)
        if offset_src:
            dst[:length].copy_(src[start : start + length])
        else:
            dst[start : start + length].copy_(src[:length])

    dp_attention.memcpy_triton = memcpy

    def reduce_scatterv(self, input_, output=None, sizes=None):
        """GroupCoordinator.reduce_scatterv without pynccl."""
        sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
        total, rank = input_.clone(), self.rank_in_group
        dist.all_reduce(total, group=self.device_group)
        part = total[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
        return part.clone() if output is None else output.copy_(part)

    GroupCoordinator.reduce_scatterv = reduce_scatterv
    # These two are custom operators registered for accelerators only.
    GroupCoordinator.reduce_scatter_tensor = lambda self, output, input: reduce_scatterv(self, input, output)
    GroupCoordinator.all_gather_into_tensor = lambda self, output, input: dist.all_gather_into_tensor(
        output, input, group=self.device_group
    )


def _complete_torch_cpu():
    """Two functions of a device module that SGLang's recorder and its updater of expert locations call."""
    import torch

    if not hasattr(torch.cpu, "empty_cache"):
        torch.cpu.empty_cache = lambda: None
    if not hasattr(torch.cpu, "is_current_stream_capturing"):
        torch.cpu.is_current_stream_capturing = lambda: False


def _stand_in_for_mooncake():
    """The way of the KV cache from a prefill to a decode server, unless mooncake itself is installed."""
    import importlib.util

    if importlib.util.find_spec("mooncake") is None:
        import mooncake_stand_in

        mooncake_stand_in.install()


def load():
    _complete_torch_cpu()
    _stand_in_for_mooncake()
    _replace_native_moe()
    _register_mla_handler()
    _complete_dp_attention()
    logger.info("CPU engine stand-ins loaded")
