"""Stand-in for sgl_kernel's CPU build, which no registry carries.

SGLang takes its native torch paths when the CPU has no AMX build; only the names below are imported all the same.
"""

__version__ = "0.0.0"


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Write each request's new cache locations into its row of the request-to-token table."""
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + (end - start)].to(req_to_token.dtype)
        taken += end - start


def _unavailable(name):
    def call(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel stand-in: {name} is not available on this CPU")

    return call


copy_all_layer_kv_cache_cpu = _unavailable("copy_all_layer_kv_cache_cpu")
assign_extend_cache_locs_cpu = _unavailable("assign_extend_cache_locs_cpu")
assign_draft_cache_locs_contiguous_cpu = _unavailable("assign_draft_cache_locs_contiguous_cpu")
verify_tree_greedy_cpu = _unavailable("verify_tree_greedy_cpu")
build_tree_kernel_efficient_cpu = _unavailable("build_tree_kernel_efficient_cpu")
rotate_input_ids_cpu = _unavailable("rotate_input_ids_cpu")
fill_accept_out_cache_loc_cpu = _unavailable("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _unavailable("fill_bonus_tokens_cpu")
