"""Models with loops over experts give the tokens of their own code, and say what became of the loops."""

from __future__ import annotations

import pytest
import torch
from tests.experts import blocks
from tests.experts.models import VOCAB_SIZE, factory, make_decoder
from torch import nn

from shardwright import LLM, SamplingParams, register_model
from shardwright.adapt.rungs import AttentionRung
from shardwright.experts.block import GroupedExperts
from shardwright.experts.loops import ExpertLoops
from shardwright.layers.cpu_linears import replace_linears
from shardwright.models import registry
from shardwright.worker import ladder
from shardwright.worker.ladder import climb
from shardwright.worker.packed import PackedModel
from shardwright.worker.self_check import check_logits, plain_logits
from shardwright.worker.step import StepModel

PROMPTS = [[5, 9, 33, 7, 21], [40 + i for i in range(17)], [60, 4, 4, 61]]
NUM_TOKENS = 10
QUICK = (blocks.Masks, blocks.EveryExpert, blocks.Capacity)
CROWDED = (blocks.Capacity, blocks.ExpertChoice)
KINDS = [
    pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow)
    for kind in (*blocks.GROUPED, blocks.ExpertChoice, blocks.Capacity, blocks.NotLinear)
]


@torch.inference_mode()
def plain_tokens(model: nn.Module, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_its_own_code(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registrations", {})
    register_model("mine", factory(kind))
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM("mine", dtype="float32", block_size=4, max_num_seqs=4, max_num_batched_tokens=16) as llm:
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        reason = llm.info.attention_reason
    plain = make_decoder(kind)
    expected = [plain_tokens(plain, prompt) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) > 5
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert ("give a token depends on how many others there are" in reason) == (kind in CROWDED)


def climbed(model: nn.Module, num_positions: int, loops: ExpertLoops | None = None) -> PackedModel:
    served = climbed_somewhere(model, num_positions, loops)
    assert isinstance(served, PackedModel)
    return served


def climbed_somewhere(model: nn.Module, num_positions: int, loops: ExpertLoops | None = None) -> StepModel:
    return climb(
        model,
        num_positions=num_positions,
        vocab_size=VOCAB_SIZE,
        block_size=4,
        dtype=torch.float32,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
        loops=loops,
    )


def test_steps_are_recorded() -> None:
    sizes = {"num_positions": 64, "vocab_size": VOCAB_SIZE, "most_tokens": 32, "most_rows": 4}
    served = climbed(make_decoder(blocks.Masks), 64)
    assert served.record(**sizes) is None


def test_requests_are_not_computed_together_where_all_tokens_decide() -> None:
    assert climbed_somewhere(make_decoder(blocks.Looks), 64).rung is AttentionRung.RECOMPUTE


@pytest.mark.parametrize("kind", [blocks.EveryExpert, blocks.Stacked])
def test_attention_beside_them_is_looked_at_far_away(kind: type[nn.Module]) -> None:
    """In a pass without numbers."""
    model = make_decoder(kind, num_positions=1024)
    expected = plain_logits(model, vocab_size=VOCAB_SIZE)
    replace_linears(model)
    served = climbed(model, 1024)
    assert served.rung is AttentionRung.SDPA
    assert isinstance(model.layers[0].block, GroupedExperts)
    check_logits(served, expected, vocab_size=VOCAB_SIZE, block_size=4, dtype=torch.float32)


def test_the_models_own_logits_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should experts pass their proof, and the model give other logits all the same."""
    given = [plain_logits(make_decoder(blocks.Masks), vocab_size=VOCAB_SIZE), torch.randn(15, VOCAB_SIZE)]
    monkeypatch.setattr(ladder, "plain_logits", lambda module, vocab_size: given.pop(0))
    model = make_decoder(blocks.Masks)
    loops = ExpertLoops(model)
    with torch.inference_mode(), loops.watching():
        model(torch.tensor([PROMPTS[0]]))
    climbed(model, 64, loops)
    assert all("logits differ" in loop.reason for loop in loops.found)
    assert type(model.layers[0].block) is blocks.Masks
