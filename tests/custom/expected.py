"""Which rung of the ladder each of the modeling files stands on, and why it is no better one."""

from __future__ import annotations

SDPA = {
    "alibi_sdpa", "bool_mask_gpt", "cached_sdpa", "causal_llama", "flex_scores", "float_mask_sinusoid",
    "grouped_queries", "last_logits", "latent_sdpa", "local_global", "mha_block", "parallel_block",
    "remembered_length", "tiled_heads", "torch_encoder",
}  # fmt: skip
DATAFLOW = {
    "alibi_bare", "alibi_buffer", "alibi_cached", "baddbmm_net", "bmm_gpt", "broadcast_groups", "capped_scores",
    "clipped_relative", "complex_rope", "cosine_scores", "document_mask", "einsum_net", "exp_sum", "flat_head",
    "gathered_rope", "grouped_einsum", "growing_tables", "keys_first", "latent_parts", "masked_exp", "mha_weights",
    "moe_loop", "own_softmax", "sink_column", "start_position", "t5_bias", "time_first", "tril_gpt", "windowed_raw",
}  # fmt: skip
PER_REQUEST = {
    "talking_heads": "its weights are not the softmax of its scores",
}
RECOMPUTE = {
    "data_dependent": "its code computes differently for different prompts",
    "early_exit": "its code decides by a number computed of all tokens of a prompt together",
    "full_experts": "in a sequence of 60 tokens",
    "linear_attention": "no attention was found in its forward pass",
    "lone_token": "its code took another path than when it was traced",
    "prefix_lm": "its attention is not causal",
    "stretched_rope": "logits differ from those of its own forward pass",
    "token_shift": "logits differ from those of its own forward pass",
}

LATENT = {"latent_parts", "latent_sdpa"}
"""Those that cache latents in place of keys and values."""

QUICK = {
    "alibi_bare", "causal_llama", "cosine_scores", "document_mask", "flex_scores", "full_experts", "gathered_rope",
    "growing_tables", "latent_parts", "linear_attention", "sink_column", "start_position", "t5_bias", "talking_heads",
    "time_first", "torch_encoder", "tril_gpt",
}  # fmt: skip
"""Run by default: one of each rung, and of each kind of positions."""

RUNGS = (
    dict.fromkeys(SDPA, "sdpa")
    | dict.fromkeys(DATAFLOW, "dataflow")
    | dict.fromkeys(PER_REQUEST, "per-request")
    | dict.fromkeys(RECOMPUTE, "recompute")
)
REASONS = PER_REQUEST | RECOMPUTE
