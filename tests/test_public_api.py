"""What users build on: names, options and fields. Adding is free; taking away or renaming breaks somebody's program."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import version

import msgspec
import pytest

import shardwright
from shardwright import errors, outputs
from shardwright.config import EngineConfig, engine_options

ENGINE_OPTIONS = {
    "tokenizer": None,
    "revision": None,
    "dtype": "auto",
    "load_format": "auto",
    "weights": None,
    "weight_map": None,
    "trust_remote_code": False,
    "max_model_len": None,
    "device": "auto",
    "seed": 0,
    "self_check": True,
    "task": "auto",
    "block_size": 16,
    "kv_cache_memory_bytes": None,
    "gpu_memory_utilization": 0.9,
    "enable_prefix_caching": True,
    "max_num_seqs": 64,
    "max_num_batched_tokens": None,
    "enable_chunked_prefill": True,
    "scheduling_policy": "fcfs",
    "pooling": "auto",
    "normalize": None,
}

SAMPLING_FIELDS = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "max_tokens": 16,
    "min_tokens": 0,
    "stop": None,
    "stop_token_ids": None,
    "ignore_eos": False,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "logprobs": None,
    "prompt_logprobs": None,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
}


def test_names_at_the_top() -> None:
    assert {"LLM", "AsyncLLM", "SamplingParams", "register_model", "__version__"} <= set(shardwright.__all__)
    assert all(hasattr(shardwright, name) for name in shardwright.__all__)
    assert shardwright.__version__ == version("shardwright")


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="LLMM"):
        _ = shardwright.LLMM


def test_engine_options_keep_names_and_defaults() -> None:
    options = {field.name: field.default for _, field in engine_options()}
    assert ENGINE_OPTIONS.items() <= options.items()


def test_sampling_fields_keep_names_and_defaults() -> None:
    fields = {field.name: field.default for field in msgspec.structs.fields(shardwright.SamplingParams)}
    assert SAMPLING_FIELDS.items() <= fields.items()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (shardwright.LLM.generate, ["prompts", "sampling_params", "use_tqdm"]),
        (shardwright.LLM.chat, ["messages", "sampling_params", "use_tqdm", "template_kwargs"]),
        (shardwright.LLM.stream, ["prompts", "sampling_params"]),
        (shardwright.LLM.embed, ["prompts", "dimensions", "truncate_prompt_tokens", "use_tqdm"]),
        (shardwright.LLM.classify, ["prompts", "truncate_prompt_tokens", "use_tqdm"]),
        (shardwright.LLM.score, ["text_1", "text_2", "truncate_prompt_tokens", "use_tqdm"]),
        (shardwright.LLM.close, []),
        (shardwright.AsyncLLM.generate, ["prompt", "sampling_params", "request_id", "priority", "stream"]),
        (shardwright.AsyncLLM.embed, ["prompts", "dimensions", "truncate_prompt_tokens"]),
        (shardwright.AsyncLLM.classify, ["prompts", "truncate_prompt_tokens"]),
        (shardwright.AsyncLLM.abort, ["request_id"]),
        (shardwright.AsyncLLM.close, []),
    ],
)
def test_methods_keep_their_parameters(method: object, parameters: list[str]) -> None:
    assert callable(method)
    assert list(inspect.signature(method).parameters)[1:] == parameters


def test_unknown_option_gets_the_near_name() -> None:
    with pytest.raises(errors.ConfigError, match="unknown engine option .*: did you mean max_model_len"):
        EngineConfig.from_options("smollm2-135m", max_model_length=5)


def test_bad_input_is_a_value_error_and_failure_a_runtime_error() -> None:
    for error in vars(errors).values():
        if isinstance(error, type) and error is not errors.ShardwrightError:
            assert issubclass(error, errors.ShardwrightError)
            assert issubclass(error, ValueError) != issubclass(error, RuntimeError)


def test_finish_reasons_are_openais_strings() -> None:
    assert {str(reason) for reason in outputs.FinishReason} == {"stop", "length", "abort"}


def test_commands_are_there() -> None:
    done = subprocess.run([sys.executable, "-m", "shardwright", "--help"], capture_output=True, text=True, check=True)
    for command in ("run", "serve", "complete", "chat", "models", "inspect", "bench"):
        assert f"\n  {command} " in done.stdout
