import msgspec
import numpy as np
import pytest
from tests.engine.tokenizers_for_tests import byte_ids, byte_tokenizer, sentencepiece_tokenizer

from shardwright.engine.input_processor import InputProcessor, Prompt, prompt_text
from shardwright.engine.messages import EngineRequest
from shardwright.errors import PromptTooLongError, RequestError
from shardwright.sampling_params import SamplingParams

VOCAB = 300


def make_processor(*, max_model_len: int = 32, vocab_size: int = VOCAB) -> InputProcessor:
    return InputProcessor(byte_tokenizer(), vocab_size=vocab_size, max_model_len=max_model_len, eos_token_ids=[7, 2, 7])


def process(prompt: Prompt, **params: object) -> list[EngineRequest]:
    return make_processor().process("r", prompt, SamplingParams(**params), arrival_time=1.5, priority=-2)


@pytest.mark.parametrize(
    "prompt",
    ["hi", {"prompt": "hi"}, byte_ids(b"hi"), {"prompt_token_ids": byte_ids(b"hi")}, list(np.array(byte_ids(b"hi")))],
)
def test_every_form_of_a_prompt_becomes_the_same_request(prompt):
    (request,) = process(prompt, max_tokens=5, temperature=0.5)
    assert request == EngineRequest(
        request_id="r",
        prompt_token_ids=byte_ids(b"hi"),
        sampling_params=SamplingParams(max_tokens=5, temperature=0.5),
        eos_token_ids=[2, 7],
        arrival_time=1.5,
        priority=-2,
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=EngineRequest) == request


def test_prompt_text_is_known_for_text_only():
    assert prompt_text("hi") == prompt_text({"prompt": "hi"}) == "hi"
    assert prompt_text([1, 2]) is prompt_text({"prompt_token_ids": [1]}) is None


def test_completions_have_ids_and_seeds_of_their_own_and_share_the_prompt_logprobs_of_the_first():
    requests = process("hi", n=3, seed=10, prompt_logprobs=2)
    assert [request.request_id for request in requests] == ["r-0", "r-1", "r-2"]
    assert [request.sampling_params.seed for request in requests] == [10, 11, 12]
    assert [request.sampling_params.n for request in requests] == [1, 1, 1]
    assert [request.sampling_params.prompt_logprobs for request in requests] == [2, None, None]


@pytest.mark.parametrize(("asked", "given"), [(None, 30), (5, 5), (30, 30), (31, 30), (10**12, 30)])
def test_max_tokens_is_what_fits_at_most(asked, given):
    (request,) = process("hi", max_tokens=asked)
    assert request.sampling_params.max_tokens == given


def test_a_prompt_may_leave_room_for_a_single_token():
    (request,) = process("x" * 31)
    assert request.sampling_params.max_tokens == 1


@pytest.mark.parametrize("length", [32, 33, 4310])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(length):
    with pytest.raises(PromptTooLongError, match=rf"prompt has {length:,} tokens but max_model_len is 32\b") as caught:
        process("x" * length)
    assert caught.value.param == "prompt"


def test_ignore_eos_drops_the_end_tokens():
    assert process("hi", ignore_eos=True)[0].eos_token_ids == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ({"prompt": ""}, "empty"),
        ({"prompt_token_ids": []}, "empty"),
        ([1, VOCAB], "token id 300, but the model's ids go from 0 to 299"),
        ([-1, 1], "token id -1"),
        ([1, 2.0], "holds 2.0"),
        ([1, True], "holds True"),
        ([1, None], "holds None"),
        (["a", "b"], "a list of prompts"),
        ([[1, 2]], "a list of prompts"),
        (None, "not NoneType"),
        (7, "not int"),
        (b"hi", "not bytes"),
        ({}, "either prompt or prompt_token_ids"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "either prompt or prompt_token_ids"),
        ({"prompt": "a", "image": "b"}, "no 'image'"),
        ({1: "a"}, "no 1"),
        ("half \ud83d", "character 5"),
        ("\u65e5\U0001f600\u65e5", None),
    ],
)
def test_prompts_that_are_none_are_refused(prompt, message):
    if message is None:
        process(prompt)
        return
    with pytest.raises(RequestError, match=message) as caught:
        process(prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "param"),
    [({"prompt": [1]}, "prompt"), ({"prompt_token_ids": "a"}, "prompt_token_ids"), ({"prompt": None}, "prompt")],
)
def test_a_dict_with_the_wrong_type_names_its_key(prompt, param):
    with pytest.raises(RequestError, match=f"^{param} is .* but must be") as caught:
        process(prompt)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"stop_token_ids": [3, VOCAB]}, "stop_token_ids"),
        ({"stop": ["fine", "half \ud83d"]}, "stop"),
        ({"min_tokens": 31, "max_tokens": None}, "min_tokens"),
        ({"min_tokens": 31, "max_tokens": 40}, "min_tokens"),
        ({"n": 2, "seed": 2**63 - 1}, "seed"),
    ],
)
def test_parameters_that_do_not_fit_the_model_are_refused(params, param):
    with pytest.raises(RequestError) as caught:
        process("hi", **params)
    assert caught.value.param == param


def test_tokens_of_the_tokenizer_that_the_model_lacks_are_refused():
    with pytest.raises(RequestError, match="token id 109"):
        make_processor(vocab_size=100).process("r", "i", SamplingParams())


def test_a_tokenizer_that_begins_every_text_makes_an_empty_one_a_prompt():
    processor = InputProcessor(sentencepiece_tokenizer(), vocab_size=1000, max_model_len=32, eos_token_ids=[])
    assert processor.process("r", " ", SamplingParams())[0].prompt_token_ids
    with pytest.raises(RequestError, match="empty"):
        processor.process("r", "", SamplingParams())
