"""Which rung of the ladder each of the modeling files stands on, and why it is no better one."""

from __future__ import annotations

SDPA = {
    "bool_mask_gpt", "cached_sdpa", "causal_llama", "float_mask_sinusoid", "grouped_queries", "last_logits",
    "local_global", "mha_block", "parallel_block", "torch_encoder",
}  # fmt: skip
DATAFLOW = {
    "alibi_bare", "alibi_cached", "baddbmm_net", "bmm_gpt", "capped_scores", "complex_rope", "einsum_net", "flat_head",
    "gathered_rope", "keys_first", "mha_weights", "moe_loop", "own_softmax", "tril_gpt", "windowed_raw",
}  # fmt: skip
PER_REQUEST: dict[str, str] = {}
RECOMPUTE = {
    "data_dependent": "its code computes differently for different prompts",
    "linear_attention": "no attention was found in its forward pass",
    "lone_token": "its code took another path than when it was traced",
    "prefix_lm": "its attention is not causal",
    "remembered_length": "its code counts tokens once, and remembers it for prompts of the same length",
    "token_shift": "logits differ from those of its own forward pass",
}

QUICK = {"alibi_cached", "causal_llama", "gathered_rope", "linear_attention", "torch_encoder", "tril_gpt"}
"""Run by default: one of each rung, and of each kind of positions."""

RUNGS = (
    dict.fromkeys(SDPA, "sdpa")
    | dict.fromkeys(DATAFLOW, "dataflow")
    | dict.fromkeys(PER_REQUEST, "per-request")
    | dict.fromkeys(RECOMPUTE, "recompute")
)
REASONS = PER_REQUEST | RECOMPUTE
