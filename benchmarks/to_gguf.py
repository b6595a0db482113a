"""Write a Llama checkpoint as a GGUF file for llama.cpp, so that both compute with the same weights.

    python benchmarks/to_gguf.py MODEL OUT.gguf [--type f32|f16|bf16|q8_0|q4_0]

For benchmarks with token ids only: the vocabulary in the file is made up (`<0>`, `<1>`, ...), since llama.cpp refuses a
file without one. Norms stay in float32, as llama.cpp wants them; with q8_0 and q4_0 all matrices are quantized, the
embedding (which is the head too) included, in q4_0 that one to q8_0. Other architectures, biases, experts and scaled
rotary embeddings are refused. Not covered: llama.cpp's kinds with blocks of 256 (q4_k), which do not divide the widths
of small models.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tqdm import tqdm

from shardwright.loading.checkpoint import open_checkpoint

TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


def gguf_name(name: str) -> str:
    """Where llama.cpp looks for a tensor. Raises SystemExit for one that a plain Llama does not have."""
    if name in OUTER:
        return OUTER[name]
    prefix, _, rest = name.removeprefix("model.layers.").partition(".")
    if not name.startswith("model.layers.") or rest not in LAYER:
        raise SystemExit(f"error: {name} is no tensor of a plain Llama")
    return f"blk.{prefix}.{LAYER[rest]}"


def rotary_pairs_together(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection.

    Hugging Face rotates feature i with i + half, llama.cpp with its neighbour, in each head.

    Args:
        weight: [num_heads * head_dim, hidden_size].
        num_heads: of queries, or of keys.

    Returns: the same shape.
    """
    head_dim = weight.shape[0] // num_heads
    halves = weight.view(num_heads, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def quantization_type(name: str, kind: str, num_dims: int) -> gguf.GGMLQuantizationType:
    """The type in which a tensor of this GGUF name is kept."""
    if num_dims == 1:
        return gguf.GGMLQuantizationType.F32
    if kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
        kind = "q8_0"
    return gguf.GGMLQuantizationType[kind.upper()]


def convert(model: Path, out: Path, kind: str) -> None:
    """Write the file."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    check(config)
    writer = gguf.GGUFWriter(out, "llama")
    add_metadata(writer, config, kind)
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    for name, weight in tqdm(list(tensors(model)), desc=f"writing {out.name}", leave=False):
        target = gguf_name(name)
        num_heads = heads.get(target.split(".", 2)[-1])
        rows = weight.float() if num_heads is None else rotary_pairs_together(weight.float(), num_heads)
        qtype = quantization_type(target, kind, weight.dim())
        writer.add_tensor(target, gguf.quantize(rows.numpy(), qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a checkpoint, one after another."""
    with open_checkpoint(model) as found:
        for name in sorted(found):
            yield name, found[name][...]


def check(config: Any) -> None:
    """Raises SystemExit for a model that this file would get wrong."""
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type != "llama":
        raise SystemExit(f"error: {config.model_type} is not converted here, only llama")
    if rope.get("rope_type", "default") != "default" or config.attention_bias or config.mlp_bias:
        raise SystemExit("error: scaled rotary embeddings and biases are not converted here")


def add_metadata(writer: gguf.GGUFWriter, config: Any, kind: str) -> None:
    """What llama.cpp has to know of the model, and a vocabulary of names that nobody reads."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name("benchmark")
    writer.add_file_type(TYPES[kind])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
    writer.add_token_scores(list(np.zeros(config.vocab_size, dtype=np.float32).tolist()))
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=TYPES, default="bf16")
    args = parser.parse_args(arguments)
    convert(args.model, args.out, args.type)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
