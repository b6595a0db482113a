"""Architectures of the installed Transformers, and what each needs to be tiny and still itself.

What they share is in `builder.SIZES`. Every kind of position code, norm, projection and mask occurs.
"""

from __future__ import annotations

from typing import Any

Table = dict[str, dict[str, Any]]

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

FULL: Table = {
    "apertus": {"rope_parameters": LLAMA3},
    "arcee": {"rope_parameters": YARN},
    "bart": {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96},
    "biogpt": {},
    "bitnet": {},
    "cohere": {"logit_scale": 1.0},
    "diffllama": {},
    "ernie4_5": {},
    "gemma": {},
    "glm": {},
    "glm4": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "granite": {"attention_multiplier": 0.25, "residual_multiplier": 0.8, "logits_scaling": 0.5},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hyperclovax": {},
    "iquestcoder": {},
    "jais2": {},
    "llama": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "seed_oss": {"rope_parameters": LINEAR},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    "stablelm": {"use_parallel_residual": True, "qk_layernorm": True},
}
"""Every layer sees the whole past."""

SLIDING: Table = {
    "cohere2": {"logit_scale": 1.0},
    "cwm": {},
    "exaone4": {},
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "modernbert-decoder": {},
    "olmo3": {},
    "phi3": {},
    "qwen2": {"use_sliding_window": True, "num_hidden_layers": 4, "max_window_layers": 2, "layer_types": None},
    "qwen3": {"use_sliding_window": True, "num_hidden_layers": 4, "max_window_layers": 2, "layer_types": None},
    "starcoder2": {},
    "vaultgemma": {"query_pre_attn_scalar": 16},
}
"""All layers, or some, see a window of 16 tokens."""

MIXED: Table = {
    "afmoe": {},
    "deepseek_v2": {"num_key_value_heads": 4, "head_dim": 8},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 8, "n_group": 2},
    "gpt_oss": {},
    "llama4_text": {"attention_chunk_size": 16, "intermediate_size_mlp": 96},
    "minicpm3": {"num_key_value_heads": 4, "head_dim": 8},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {"norm_topk_prob": True},
}
"""Experts, latent attention, chunks, sinks, and several of them at once."""

LATENT = ("deepseek_v2", "deepseek_v3", "dots3_note_text", "minicpm3")
"""Keys and values are made of latents, which are cached in their place."""

OWN_ATTENTION: Table = {
    "bloom": {},
    "codegen": {"n_ctx": 256, "rotary_dim": 8},
    "mpt": {"d_model": 60, "n_heads": 5, "n_layers": 2, "max_seq_len": 256},
}
"""They compute their attention themselves; slopes by distance among them, of five heads too."""

INDEXED: dict[str, Any] = {"num_key_value_heads": 4, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 8}

SMALLER: dict[str, Any] = {
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 12, "head_dim": 24,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip

OVER_PAGES: Table = {
    "doge": {},
    "dots3_note_text": INDEXED
    | {
        "head_dim": 24, "shared_experts_intermediate_size": 32, "mlp_layer_types": ["dense", "sparse"] * 2,
        "num_hidden_layers": 4, "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "per_layer_config": {"1": SMALLER, "3": SMALLER},
    },
    "glm_moe_dsa": INDEXED
    | {
        "num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"], "layer_types": ["indexed_attention"] * 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
}  # fmt: skip
"""Attention that chooses tokens by an index or by values: it runs as it is, over what it keeps of each token."""

LINEAR_LAYERS = ["full_attention", "linear_attention"] * 2
"""The first one is full: Transformers' MiniMax counts positions by its keys, so that its own cache is wrong else."""

STATES: Table = {
    "inkling2_text": {
        "unpadded_vocab_size": 128, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
        "sliding_window_size": 16, "rel_extent": 24, "log_scaling_n_floor": 16, "d_rel": 8,
        "layer_types": ["hybrid_sliding", "hybrid"], "num_hidden_layers": 2,
    },
    "minimax": {"block_size": 8, "layer_types": LINEAR_LAYERS},
    "qwen3_next": {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "layer_types": LINEAR_LAYERS, "num_hidden_layers": 4,
    },
    "qwen4_exp_text": {
        "hc_count": 2, "hc_lowrank": 8, "split_ngram_parts": 1, "ple_layer_ids": [1], "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 16, "ple_embed_dim": 64,
        "indexer_n_heads": 8, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
        "indexer_compress_ratio": 4, "eos_token_id": 2,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "indexed_attention"], "num_hidden_layers": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 64},
    "rwkv": {"attention_hidden_size": 64},
}  # fmt: skip
"""Layers with a state: in Transformers' cache, in a cache class of the model's own, on its modules, handed out. Beside
some of them, or with a state inside, is attention as in OVER_PAGES."""

QUICK = ("bloom", "deepseek_v3", "gemma2", "glm_moe_dsa", "gpt2", "gpt_oss", "llama", "llama4_text", "mistral")
"""One of each kind, for the daily run."""
