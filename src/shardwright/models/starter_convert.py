"""Turn the starter model's GGUF file into a directory of bfloat16 safetensors.

`python -m shardwright.models.starter_convert GGUF DIR` is a process of its own, so that the memory it needs and what
Transformers prints stay out of the engine's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def convert(gguf_file: Path, directory: Path) -> None:
    """Dequantize the weights, rebuild the tokenizer, mend what GGUF's metadata does not carry over, and save all."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    fields = GGUFReader(gguf_file).fields

    def field(name: str) -> Any:
        return fields[name].contents()

    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    special = {name: field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
    model.generation_config = GenerationConfig.from_dict(
        {"bos_token_id": special["bos"], "eos_token_id": special["eos"], "pad_token_id": special["padding"]}
    )
    model.save_pretrained(directory)

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, local_files_only=True)
    tokenizer.chat_template = field("tokenizer.chat_template")
    tokenizer.model_max_length = field("llama.context_length")
    if field("tokenizer.ggml.pre") == "smollm":
        _split_digits(tokenizer)
    tokenizer.save_pretrained(directory)


def _split_digits(tokenizer: Any) -> None:
    """Cut around every digit, as the model was trained: Transformers gives every BPE in GGUF the rules of GPT-2."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
