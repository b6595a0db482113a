"""Plain modules, served: their tokens are those of their own full forwards, whichever way they came in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from openai import BadRequestError, OpenAI
from tests.conftest import build_tokenizer
from tests.models.factory_gpt import HandmadeGPT
from tests.models.plain_models import greedy, make_gpt, write_folder
from tests.server.process import ServerProcess, free_port

from shardwright import LLM, AsyncLLM, SamplingParams, register_model
from shardwright.errors import CheckpointError, ConfigError, RequestError
from shardwright.models import registry

PROMPTS = [[1, 2, 3, 4, 5], [90, 7] * 8, [50], list(range(40))]
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SMALL = {"kv_cache_memory_bytes": "1MiB"}


@pytest.fixture(autouse=True)
def no_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registrations", {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("custom") / "gpt")


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [greedy(make_gpt(), prompt, NUM_TOKENS) for prompt in PROMPTS]


def generate(llm: LLM) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def test_folder_is_served_packed(folder: Path, expected: list[list[int]]) -> None:
    with LLM(str(folder), trust_remote_code=True, **SMALL) as llm:
        assert (llm.info.attention_rung, llm.info.model_type, llm.info.architecture) == (
            "dataflow",
            "custom",
            "HandmadeGPT",
        )
        assert (llm.info.vocab_size, llm.info.max_model_len, llm.info.dtype) == (96, 128, "float32")
        assert generate(llm) == expected
        assert generate(llm) == expected  # from cached prefixes


def test_prompts_in_pieces_give_the_same(folder: Path, expected: list[list[int]]) -> None:
    with LLM(str(folder), trust_remote_code=True, max_num_batched_tokens=7, max_num_seqs=2, **SMALL) as llm:
        assert generate(llm) == expected


def test_without_a_tokenizer_there_are_token_ids_and_no_text(folder: Path) -> None:
    with LLM(str(folder), trust_remote_code=True, **SMALL) as llm:
        params = SamplingParams(temperature=0, max_tokens=2, logprobs=1)
        [output] = llm.generate([[1, 2, 3]], params, use_tqdm=False)
        assert output.outputs[0].text == ""
        assert output.outputs[0].logprobs is not None
        [chosen] = output.outputs[0].logprobs[0].values()
        assert chosen.decoded_token == f"token_id:{output.outputs[0].token_ids[0]}"
        with pytest.raises(RequestError, match="has no tokenizer: give the prompt as token ids, or .* --tokenizer"):
            llm.generate("Hello", use_tqdm=False)
        with pytest.raises(RequestError, match="has no tokenizer"):
            llm.chat([{"role": "user", "content": "Hello"}], use_tqdm=False)
        with pytest.raises(RequestError, match="has no tokenizer, and stop is looked for in text: use stop_token_ids"):
            llm.generate([1, 2], SamplingParams(stop="x"), use_tqdm=False)


def test_tokenizer_beside_the_code_is_used(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "gpt")
    build_tokenizer().save_pretrained(tmp_path / "gpt")
    (tmp_path / "gpt" / "config.json").write_text('{"n_layer": 2}')  # the author's own
    with LLM(str(tmp_path / "gpt"), trust_remote_code=True, **SMALL) as llm:
        [output] = llm.generate("Hello", GREEDY, use_tqdm=False)
        assert output.outputs[0].token_ids == greedy(make_gpt(), output.prompt_token_ids, NUM_TOKENS)
        assert output.outputs[0].text
    with LLM(str(folder), tokenizer=str(tmp_path / "gpt"), trust_remote_code=True, **SMALL) as llm:
        assert llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0].text == output.outputs[0].text


def test_registered_module_with_its_own_weights(expected: list[list[int]]) -> None:
    register_model("handmade", make_gpt, eos_token_ids=expected[0][3])
    with LLM("handmade", **SMALL) as llm:
        assert llm.info.path == ""
        assert generate(llm) == expected
        [output] = llm.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=NUM_TOKENS), use_tqdm=False)
        assert output.outputs[0].finish_reason == "stop"
        assert output.outputs[0].token_ids == expected[0][:4]


def test_config_of_the_authors_own_form_is_left_alone(expected: list[list[int]]) -> None:
    def make() -> HandmadeGPT:
        module = make_gpt()
        module.config = {"layers": 2}  # type: ignore[assignment]
        return module

    register_model("handmade", make)
    with LLM("handmade", **SMALL) as llm:
        assert llm.info.attention_rung == "dataflow"
        assert generate(llm) == expected


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_code_that_compiles_itself_runs_as_it_is_written(expected: list[list[int]]) -> None:
    def make() -> HandmadeGPT:
        module = make_gpt()
        for block in module.blocks:
            block.forward = torch.compile(block.forward)
        return module

    register_model("handmade", make)
    with LLM("handmade", **SMALL) as llm:
        assert llm.info.attention_rung == "dataflow"
        assert generate(llm) == expected


def test_registered_module_with_a_checkpoint(folder: Path, expected: list[list[int]]) -> None:
    register_model("handmade", HandmadeGPT, weights=folder, max_model_len=100)
    with LLM("handmade", **SMALL) as llm:
        assert llm.info.max_model_len == 100
        assert generate(llm) == expected
    with pytest.raises(ConfigError, match="max_model_len is 101 but the model has 100 positions: lower it"):
        LLM("handmade", max_model_len=101)


async def test_registered_module_in_another_process(folder: Path, expected: list[list[int]]) -> None:
    register_model("handmade", HandmadeGPT, weights=folder)
    engine = AsyncLLM("handmade", **SMALL)
    try:
        async for output in engine.generate(PROMPTS[0], GREEDY):
            token_ids = output.outputs[0].token_ids
        assert token_ids == expected[0]
    finally:
        engine.close()


def test_plain_modules_only_generate(folder: Path) -> None:
    with pytest.raises(ConfigError, match="code of its own, which is served to generate alone: leave out --task"):
        LLM(str(folder), trust_remote_code=True, task="embed")


def test_weights_of_another_model_are_refused(folder: Path, tiny_llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"names in .* are not those of HandmadeGPT"):
        LLM(str(folder), weights=str(tiny_llama), trust_remote_code=True)


def test_weights_of_a_transformers_model_may_lie_elsewhere(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    with LLM(str(tiny_llama), **SMALL) as llm:
        expected = generate(llm)
    with LLM(str(tmp_path / "config"), weights=str(tiny_llama / "model.safetensors"), **SMALL) as llm:
        assert generate(llm) == expected


@pytest.mark.slow
def test_server_takes_and_gives_token_ids(folder: Path, expected: list[list[int]]) -> None:
    port = free_port()
    options = ("--trust-remote-code", "--served-model-name", "gpt", "--kv-cache-memory-bytes", "1MiB")
    server = ServerProcess("-m", "shardwright", "serve", str(folder), "--port", str(port), *options, port=port)
    try:
        server.wait_until_ready()
        body = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": NUM_TOKENS, "return_token_ids": True}
        [choice] = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"]
        assert (choice["text"], choice["token_ids"], choice["prompt_token_ids"]) == ("", expected[0], PROMPTS[0])
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}) as stream:
            lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: {")]
        assert [t for line in lines for t in json.loads(line)["choices"][0]["token_ids"]] == expected[0]
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(BadRequestError, match="has no tokenizer: give the prompt as token ids"):
                client.completions.create(model="gpt", prompt="Hello")
            with pytest.raises(BadRequestError, match="has no tokenizer|no chat template"):
                client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "Hello"}])
    finally:
        server.kill()
