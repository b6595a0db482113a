"""Vocabulary, longest sequence and layers of a module are found out, wherever it says them, or if nowhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.models.plain_models import make_gpt
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from shardwright.adapt.describe import CustomConfig, describe
from shardwright.errors import UnsupportedModelError
from shardwright.models.build import parameters_on_meta

VOCAB = 40
WIDTH = 8


class Net(nn.Module):
    """Embedding, something that depends on positions, head."""

    def __init__(self, positions: Callable[[Net, Tensor], Tensor] | None = None, **tables: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self._positions = positions
        for name, table in tables.items():
            if isinstance(table, Tensor) and not isinstance(table, nn.Parameter):
                self.register_buffer(name, table)
            else:
                setattr(self, name, table)

    def forward(self, ids: Tensor) -> Any:
        x = self.tokens(ids)
        if self._positions is not None:
            x = x + self._positions(self, ids)
        return self.head(x)


def limit(module: nn.Module, **known: Any) -> int | None:
    found: int | None = describe(module, **known).max_position_embeddings
    return found


@pytest.mark.parametrize("context", [parameters_on_meta, torch.no_grad])
def test_module_that_says_nothing(context: Any) -> None:
    with context():
        module = make_gpt()
    config = describe(module)
    assert isinstance(config, CustomConfig)
    assert config.model_type == "custom"
    assert (config.vocab_size, config.max_position_embeddings, config.num_hidden_layers) == (96, 128, 2)
    assert config.eos_token_id is None


def arange(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device)


def squared(ids: Tensor) -> Tensor:
    return torch.zeros(ids.shape[1], ids.shape[1], device=ids.device)


@pytest.mark.parametrize(
    "module",
    [
        Net(lambda self, ids: self.table(arange(ids)), table=nn.Embedding(50, WIDTH)),
        Net(lambda self, ids: self.table(arange(ids)[None].expand_as(ids)), table=nn.Embedding(50, WIDTH)),
        Net(lambda self, ids: self.table(torch.ones_like(ids).cumsum(-1) - 1), table=nn.Embedding(50, WIDTH)),
        Net(lambda self, ids: self.table(self.at[:, : ids.shape[1]]), table=nn.Embedding(50, WIDTH), at=torch.arange(50)[None]),  # noqa: E501
        Net(lambda self, ids: self.table[: ids.shape[1]], table=nn.Parameter(torch.zeros(50, WIDTH))),
        Net(lambda self, ids: self.table[:, : ids.size(1), :], table=nn.Parameter(torch.zeros(1, 50, WIDTH))),
        Net(lambda self, ids: self.table[arange(ids)], table=torch.zeros(50, WIDTH)),
        Net(lambda self, ids: self.table.index_select(0, arange(ids)), table=torch.zeros(50, WIDTH)),
        Net(lambda self, ids: squared(ids).masked_fill(self.mask[: len(ids[0]), : len(ids[0])] == 0, 0).sum(-1)[:, None], mask=torch.ones(50, 50)),  # noqa: E501
    ],
)  # fmt: skip
def test_tables_of_positions_bound_the_length(module: nn.Module) -> None:
    assert limit(module) == 50
    assert limit(module, max_model_len=32) == 32
    assert limit(module, max_model_len=64) == 50


def test_own_check_of_the_length_is_found() -> None:
    def check(self: Net, ids: Tensor) -> Tensor:
        assert ids.shape[1] <= 77, "too long"
        return torch.zeros(())

    assert limit(Net(check)) == 77


@pytest.mark.parametrize(
    "module",
    [
        Net(),
        Net(lambda self, ids: self.types(torch.zeros_like(ids)), types=nn.Embedding(2, WIDTH)),
        Net(lambda self, ids: self.pairs(ids * 31 % 64), pairs=nn.Embedding(64, WIDTH)),
        Net(lambda self, ids: self.experts[self.tokens(ids).argmax(-1)], experts=nn.Parameter(torch.zeros(64, WIDTH))),
    ],
)
def test_other_tables_bound_nothing(module: nn.Module) -> None:
    assert limit(module) is None


@pytest.mark.parametrize("holder", [None, "config", "args", "hparams"])
@pytest.mark.parametrize("name", ["block_size", "max_seq_len", "n_ctx"])
def test_length_that_the_code_names_is_kept(holder: str | None, name: str) -> None:
    module = Net()
    if holder is None:
        setattr(module, name, 30)
    else:
        setattr(module, holder, {name: 30} if holder == "args" else SimpleNamespace(**{name: 30}))
    assert limit(module) == 30


def test_names_that_mean_something_else_are_not_taken() -> None:
    module = Net()
    module.max_len, module.n_layer, module.vocab_size = -1, True, "large"  # type: ignore[assignment]
    config = describe(module)
    assert (config.max_position_embeddings, config.num_hidden_layers, config.vocab_size) == (None, None, VOCAB)


def test_what_is_given_goes_first() -> None:
    config = describe(make_gpt(), vocab_size=96, max_model_len=100, num_layers=7, eos_token_ids=3)
    assert (config.max_position_embeddings, config.num_hidden_layers, config.eos_token_id) == (100, 7, [3])


def test_vocabulary_that_is_not_the_forwards_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="vocabulary is said to be 97, but its forward gives 96 logits"):
        describe(make_gpt(), vocab_size=97)


def looks_at_values(self: Net, ids: Tensor) -> Tensor:
    return self.table[: ids.shape[1]] if ids.max() > 0 else torch.zeros(())


def works_for_some(self: Net, ids: Tensor) -> Tensor:
    raise ValueError("only for tokens that I like")


@pytest.mark.parametrize("context", [parameters_on_meta, torch.no_grad])
def test_code_that_looks_at_values_runs_with_zeros_for_weights(context: Any) -> None:
    with context():
        module = Net(looks_at_values, table=nn.Parameter(torch.ones(50, WIDTH)))
    assert (describe(module).vocab_size, limit(module)) == (VOCAB, 50)
    assert module.table.is_meta is (context is parameters_on_meta)


def test_code_that_does_not_run_is_described_by_its_tables() -> None:
    module = Net(works_for_some, table=nn.Embedding(50, WIDTH), types=nn.Embedding(2, 3))
    assert (describe(module).vocab_size, limit(module)) == (VOCAB, 50)


def test_vocabulary_that_cannot_be_told() -> None:
    class Odd(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            raise ValueError("odd")

    with pytest.raises(
        UnsupportedModelError, match=r"of Odd cannot be told: .* \(ValueError: odd\): .* an attribute vocab_size"
    ):
        describe(Odd())
    module = Odd()
    module.vocab_size = 5  # type: ignore[assignment]
    assert describe(module).vocab_size == 5


def test_looking_changes_nothing_in_the_module() -> None:
    class Lazy(Net):
        """Makes a table when it first runs, and keeps it."""

        def forward(self, ids: Tensor) -> Any:
            if not hasattr(self, "cache"):
                self.register_buffer("cache", torch.zeros(ids.shape[1], device=ids.device))
            return super().forward(ids)

    module = Lazy()
    before = {name: id(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    describe(module)
    assert not hasattr(module, "cache")
    assert {name: id(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())} == before


def test_transformers_models_bring_their_config() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with parameters_on_meta():
        module = LlamaForCausalLM(config)
    assert describe(module) is module.config


def test_layers_that_go_from_token_to_token_are_not_waited_for() -> None:
    class Recurrent(Net):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

        def forward(self, ids: Tensor) -> Any:
            return self.head(self.rnn(self.tokens(ids))[0])

    started = time.perf_counter()
    assert limit(Recurrent()) is None
    assert time.perf_counter() - started < 10
