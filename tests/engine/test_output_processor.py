import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.tokenizers_for_tests import EOS, byte_ids, byte_tokenizer

from shardwright.engine.cumulative_output import CumulativeOutput
from shardwright.engine.messages import EngineOutput, TokenLogprobs
from shardwright.engine.output_processor import OutputProcessor
from shardwright.errors import RequestError
from shardwright.outputs import FinishReason, Logprob, RequestOutput
from shardwright.sampling_params import SamplingParams


def make_processor(params: SamplingParams | None = None, *, n: int = 1, prompt: bytes = b"hi") -> OutputProcessor:
    """A processor with the request "r", which arrived at 10 s."""
    processor = OutputProcessor(byte_tokenizer())
    add_request(processor, "r", params, n=n, prompt=prompt)
    return processor


def add_request(
    processor: OutputProcessor,
    request_id: str,
    params: SamplingParams | None = None,
    *,
    n: int = 1,
    prompt: bytes = b"hi",
) -> None:
    processor.add(
        request_id,
        prompt=prompt.decode(),
        prompt_token_ids=byte_ids(prompt),
        params=params or SamplingParams(n=n),
        child_ids=[request_id] if n == 1 else [f"{request_id}-{i}" for i in range(n)],
        arrival_time=10.0,
    )


def step(
    processor: OutputProcessor, tokens: Sequence[int], *, child: str = "r", now: float = 11.0, **fields: object
) -> tuple[RequestOutput | None, list[str]]:
    """What one step of one sequence brings: its request's output, if any, and what to abort."""
    done = processor.process([EngineOutput(request_id=child, new_token_ids=list(tokens), **fields)], now)
    assert len(done.request_outputs) <= 1
    return (done.request_outputs[0] if done.request_outputs else None), done.abort_ids


def run(
    processor: OutputProcessor, chunks: Sequence[Sequence[int]], *, reason: FinishReason = FinishReason.LENGTH
) -> tuple[list[RequestOutput], list[str]]:
    """Deltas of a sequence that brings these tokens step by step, and what to abort."""
    deltas, aborted = [], []
    for place, tokens in enumerate(chunks):
        delta, abort_ids = step(processor, tokens, finish_reason=reason if place == len(chunks) - 1 else None)
        deltas += [delta] if delta else []
        aborted += abort_ids
    return deltas, aborted


def total(deltas: Sequence[RequestOutput]) -> RequestOutput:
    whole = CumulativeOutput()
    for delta in deltas:
        whole.add(delta)
    return whole.output


def singles(data: bytes) -> list[list[int]]:
    """A step for each byte."""
    return [[token_id] for token_id in byte_ids(data)]


def test_deltas_hold_only_what_is_new():
    processor = make_processor()
    first, _ = step(processor, byte_ids(b"a\xe2"))
    second, _ = step(processor, byte_ids(b"\x82\xacb"), finish_reason=FinishReason.LENGTH, now=12.5)
    assert first is not None
    assert second is not None
    assert (first.outputs[0].text, first.outputs[0].token_ids, first.finished) == ("a", byte_ids(b"a\xe2"), False)
    assert (second.outputs[0].text, second.outputs[0].token_ids) == ("\u20acb", byte_ids(b"\x82\xacb"))
    assert (second.finished, second.outputs[0].finish_reason) == (True, FinishReason.LENGTH)
    assert first.outputs[0].finish_reason is None
    assert second.prompt == "hi"
    assert second.prompt_token_ids == byte_ids(b"hi")
    assert processor.num_unfinished == 0


def test_half_a_character_at_the_end_is_dropped():
    deltas, _ = run(make_processor(), singles(b"ok\xf0\x9f\x98"))
    assert total(deltas).outputs[0].text == "ok"
    assert len(total(deltas).outputs[0].token_ids) == 5


def test_wrong_bytes_at_the_end_are_text():
    deltas, _ = run(make_processor(), singles(b"ok\xff"))
    assert total(deltas).outputs[0].text == "ok\ufffd"
    deltas, _ = run(make_processor(SamplingParams(stop="k\ufffd")), singles(b"ok\xff"))
    assert (total(deltas).outputs[0].text, total(deltas).outputs[0].stop_reason) == ("o", "k\ufffd")


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("stop_reason", [None, 4 + ord(".")])
def test_the_text_of_a_stop_token_is_hidden_unless_asked_for(include, stop_reason):
    params = SamplingParams(include_stop_str_in_output=include, skip_special_tokens=False)
    last = EOS if stop_reason is None else stop_reason
    output, _ = step(
        make_processor(params), [*byte_ids(b"a"), last], finish_reason=FinishReason.STOP, stop_reason=stop_reason
    )
    assert output is not None
    shown = {EOS: "</s>", stop_reason: "."}[last] if include else ""
    assert output.outputs[0].text == "a" + shown
    assert output.outputs[0].token_ids == [*byte_ids(b"a"), last]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (FinishReason.STOP, stop_reason)


def test_text_held_back_for_a_stop_string_goes_out_at_the_end():
    params = SamplingParams(stop=["STOP"])
    deltas, aborted = run(make_processor(params), singles(b"a ST"))
    assert [delta.outputs[0].text for delta in deltas] == ["a", " ", "", "ST"]
    assert aborted == []


def test_a_stop_string_ends_the_completion_and_aborts_its_sequence():
    processor = make_processor(SamplingParams(stop=["!?", "??"], logprobs=0))
    entries = [TokenLogprobs([token_id], [-1.0], 1) for token_id in byte_ids(b"no!?more")]
    output, aborted = step(processor, byte_ids(b"no!?more"), logprobs=entries)
    assert output is not None
    completion = output.outputs[0]
    assert (completion.text, completion.token_ids) == ("no", byte_ids(b"no!?"))
    assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, "!?")
    assert completion.logprobs is not None
    assert len(completion.logprobs) == 4
    assert completion.cumulative_logprob == -4
    assert output.finished
    assert aborted == ["r"]
    assert step(processor, byte_ids(b"late")) == (None, [])
    assert step(processor, [], finish_reason=FinishReason.ABORT) == (None, [])


def test_a_sequence_that_the_core_has_ended_is_not_aborted_again():
    output, aborted = step(make_processor(SamplingParams(stop="!")), byte_ids(b"a!"), finish_reason=FinishReason.LENGTH)
    assert output is not None
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (FinishReason.STOP, "!")
    assert aborted == []


def test_stop_strings_wait_for_min_tokens():
    params = SamplingParams(stop=["b"], min_tokens=4)
    deltas, aborted = run(make_processor(params), singles(b"abcbcb"))
    assert total(deltas).outputs[0].text == "abc"
    assert len(total(deltas).outputs[0].token_ids) == 4
    assert aborted == ["r"]


STOP_LISTS = st.lists(st.sampled_from(["a", "ab", "ba", "\u20ac", "a\u20ac", "bbb", "b\u20acb"]), max_size=3)


@settings(deadline=None)
@given(st.text(alphabet="ab\u20ac", max_size=12), STOP_LISTS, st.data())
def test_any_cut_into_steps_gives_the_same_completion(text, stops, data):
    tokens = byte_ids(text.encode())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    chunks = [tokens[start:end] for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
    params = SamplingParams(stop=stops)
    deltas, _ = run(make_processor(params), chunks)
    alone, _ = run(make_processor(params), [[token_id] for token_id in tokens] or [[]])
    assert total(deltas).outputs == total(alone).outputs

    completion = total(deltas).outputs[0]
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        assert completion.token_ids == byte_ids(text[: min(ends)].encode())
        assert completion.text + str(completion.stop_reason) == text[: min(ends)]
    else:
        assert completion.text == text
        assert completion.finish_reason is FinishReason.LENGTH


def test_several_completions_end_one_by_one():
    processor = make_processor(n=3)
    done = processor.process(
        [
            EngineOutput(request_id="r-2", new_token_ids=byte_ids(b"z"), num_cached_tokens=2),
            EngineOutput(request_id="r-0", new_token_ids=byte_ids(b"x"), finish_reason=FinishReason.LENGTH),
        ],
        12.0,
    )
    (delta,) = done.request_outputs
    assert [(part.index, part.text) for part in delta.outputs] == [(2, "z"), (0, "x")]
    assert not delta.finished
    whole = CumulativeOutput()
    whole.add(delta)
    for child, now in (("r-1", 13.0), ("r-2", 14.0)):
        last, _ = step(processor, byte_ids(b"y"), child=child, now=now, finish_reason=FinishReason.LENGTH)
        assert last is not None
        assert last.finished == (child == "r-2")
        whole.add(last)
    assert [(part.index, part.text) for part in whole.output.outputs] == [(0, "x"), (1, "y"), (2, "zy")]
    assert whole.output.finished


def test_metrics_run_from_arrival_to_the_first_and_the_last_token():
    processor = make_processor(n=2)
    assert step(processor, [], child="r-0", now=10.5, num_cached_tokens=1) == (None, [])
    first, _ = step(processor, byte_ids(b"a"), child="r-1", now=11.0, num_cached_tokens=2)
    second, _ = step(processor, byte_ids(b"a"), child="r-0", now=12.0, finish_reason=FinishReason.LENGTH)
    last, _ = step(processor, byte_ids(b"b"), child="r-1", now=13.5, finish_reason=FinishReason.LENGTH)
    assert first is not None
    assert second is not None
    assert last is not None
    assert (first.metrics.ttft_s, first.metrics.latency_s) == (1.0, None)
    assert second.metrics.latency_s is None
    assert (last.metrics.ttft_s, last.metrics.latency_s) == (1.0, 3.5)
    assert last.metrics.num_cached_tokens == 1  # what the second completion found was put there by the first


def test_guesses_of_all_completions_are_counted():
    processor = make_processor(n=2)
    for child, proposed, accepted in (("r-0", 4, 1), ("r-1", 3, 3), ("r-0", 2, 0)):
        delta, _ = step(
            processor, byte_ids(b"a"), child=child, num_proposed_tokens=proposed, num_accepted_tokens=accepted
        )
    assert delta is not None
    assert (delta.metrics.num_proposed_tokens, delta.metrics.num_accepted_tokens) == (9, 4)


def test_logprobs_carry_texts_and_ranks_and_sum_up():
    processor = make_processor(SamplingParams(logprobs=2))
    a, b, c = byte_ids(b"abc")
    first, _ = step(processor, [c], logprobs=[TokenLogprobs([c, a, b], [-3.0, -0.5, -1.0], 7)])
    second, _ = step(processor, [a], logprobs=[TokenLogprobs([a, a, b], [-0.5, -0.5, -1.0], 1)])
    assert first is not None
    assert second is not None
    assert first.outputs[0].logprobs == [{c: Logprob(-3.0, 7, "c"), a: Logprob(-0.5, 1, "a"), b: Logprob(-1.0, 2, "b")}]
    assert second.outputs[0].logprobs == [{a: Logprob(-0.5, 1, "a"), b: Logprob(-1.0, 2, "b")}]
    assert list(first.outputs[0].logprobs[0]) == [c, a, b]
    assert math.isclose(second.outputs[0].cumulative_logprob or 0, -3.5)
    assert total([first, second]).outputs[0].logprobs == first.outputs[0].logprobs + second.outputs[0].logprobs
    assert total([first, second]).outputs[0].cumulative_logprob == -3.5


def test_without_logprobs_there_are_none():
    output, _ = step(make_processor(), byte_ids(b"a"))
    assert output is not None
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None
    assert output.prompt_logprobs is None


def test_prompt_logprobs_of_several_chunks_come_once_and_whole():
    processor = make_processor(SamplingParams(prompt_logprobs=0), prompt=b"abcd")
    entries = [TokenLogprobs([token_id], [-1.0], 2) for token_id in byte_ids(b"bcd")]
    assert step(processor, [], prompt_logprobs=entries[:2]) == (None, [])
    first, _ = step(processor, byte_ids(b"x"), prompt_logprobs=entries[2:])
    second, _ = step(processor, byte_ids(b"y"), finish_reason=FinishReason.LENGTH)
    assert first is not None
    assert second is not None
    wanted = [None, *({token_id: Logprob(-1.0, 2, chr(token_id - 4))} for token_id in byte_ids(b"bcd"))]
    assert first.prompt_logprobs == wanted
    assert second.prompt_logprobs is None
    assert total([first, second]).prompt_logprobs == wanted


def test_a_prompt_of_one_token_has_an_empty_place_for_its_logprobs():
    output, _ = step(make_processor(SamplingParams(prompt_logprobs=1), prompt=b"a"), byte_ids(b"x"))
    assert output is not None
    assert output.prompt_logprobs == [None]


def test_abort_forgets_a_request_and_names_its_running_sequences():
    processor = make_processor(n=3)
    step(processor, byte_ids(b"a"), child="r-1", finish_reason=FinishReason.LENGTH)
    assert processor.abort("r") == ["r-0", "r-2"]
    assert processor.abort("r") == processor.abort("never seen") == []
    assert step(processor, byte_ids(b"a"), child="r-0") == (None, [])
    assert processor.num_unfinished == 0
    add_request(processor, "r", n=3)


def test_an_end_without_a_token_is_told():
    processor = make_processor(SamplingParams(stop="abc"))
    step(processor, byte_ids(b"ab"))
    output, aborted = step(processor, [], finish_reason=FinishReason.ABORT)
    assert output is not None
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("ab", [])
    assert output.outputs[0].finish_reason is FinishReason.ABORT
    assert output.finished
    assert aborted == []


def test_an_id_in_use_is_refused_and_the_request_that_has_it_goes_on():
    processor = make_processor(n=2)
    for taken in ("r", "r-1"):
        with pytest.raises(RequestError, match="in use") as caught:
            add_request(processor, taken)
        assert caught.value.param == "request_id"
    assert step(processor, byte_ids(b"a"), child="r-1")[0] is not None


def test_requests_of_one_step_are_kept_apart():
    processor = make_processor()
    add_request(processor, "s", SamplingParams(stop="b"))
    done = processor.process(
        [EngineOutput(request_id=child, new_token_ids=byte_ids(b"abc")) for child in ("s", "unknown", "r")], 11.0
    )
    assert [(output.request_id, output.outputs[0].text) for output in done.request_outputs] == [
        ("s", "a"),
        ("r", "abc"),
    ]
    assert done.abort_ids == ["s"]


def test_cumulative_outputs_do_not_change_later():
    processor = make_processor()
    whole = CumulativeOutput()
    with pytest.raises(ValueError, match="no delta"):
        _ = whole.output
    snapshots = []
    for tokens in singles(b"abc"):
        delta, _ = step(processor, tokens)
        assert delta is not None
        whole.add(delta)
        snapshots.append(whole.output)
    assert [snapshot.outputs[0].text for snapshot in snapshots] == ["a", "ab", "abc"]
    assert [snapshot.outputs[0].token_ids for snapshot in snapshots] == [byte_ids(b"abc"[: i + 1]) for i in range(3)]
