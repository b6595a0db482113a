"""What tests of several rooms share: a tiny model with a tokenizer, made on the spot."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # speed is measured in benchmarks
settings.load_profile("untimed")

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # each writes the modeling code that it loads
    os.environ["HF_MODULES_CACHE"] = str(Path(tempfile.gettempdir()) / f"shardwright-tests-{os.getuid()}-{worker}")

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels are tested without a GPU

VOCAB_SIZE = 128
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random float32 Llama: 2 layers, 256 positions, 128 byte-level tokens, a chat template."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.2,  # large enough for tokens to differ clearly
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, bos_token_id=1)
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes benchmarks measure the machine in milliseconds, and badly."""
    from shardwright.bench import machine

    monkeypatch.setattr(machine, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "GEMM_SHAPE", (64, 64, 64))
    monkeypatch.setattr(machine, "SECONDS_PER_MEASUREMENT", 0.0)


def build_tokenizer():  # type: ignore[no-untyped-def]  # a Transformers class, imported only here
    """One token per ASCII letter, newline, tab, and UTF-8 byte of some accented letters; ids 0 to 3 are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ascii_letters = ["\u0120", *map(chr, range(33, 127)), "\u010a", "\u0109"]  # GPT-2's names of space, newline, tab
    utf8_bytes = ["\u00c2", "\u00c3", *map(chr, range(0xA1, 0xAD)), *map(chr, range(0xAE, 0x100))]
    pieces = [*SPECIAL_TOKENS, *ascii_letters, *utf8_bytes][:VOCAB_SIZE]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )
