"""Modules that factories make get their weights where the user has them, and keep what they come with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.models.plain_models import equal_state, make_gpt, write_folder
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from shardwright.config import ModelConfig
from shardwright.errors import CheckpointError, ConfigError, ModelSourceError, UnsupportedModelError
from shardwright.models import registry
from shardwright.models.custom import CustomModel, cast_floats, find_custom, has_strays
from shardwright.models.registry import register_model


@pytest.fixture(autouse=True)
def no_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registrations", {})


def find(model: str | Path, **options: Any) -> CustomModel:
    custom = find_custom(ModelConfig(model=str(model), **{"trust_remote_code": True} | options))
    assert custom is not None
    return custom


def load(factory: Callable[..., Any], registered: Path | None = None, **options: Any) -> nn.Module:
    """What a registered factory makes, loaded."""
    register_model("mine", factory, weights=registered)
    custom = find("mine", **options)
    dummy = options.get("load_format") == "dummy"
    return custom.load(custom.dtype(custom.look(dummy=dummy).module), dummy=dummy)


def save(state: dict[str, Tensor], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def test_folder_is_built_on_meta_and_filled(tmp_path: Path) -> None:
    custom = find(write_folder(tmp_path / "gpt"))
    assert all(parameter.is_meta for parameter in custom.look().module.parameters())
    module = custom.load(torch.float32)
    assert equal_state(module, make_gpt())
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_folder_needs_permission_to_run_its_code(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "gpt")
    (folder / "factory.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelSourceError, match=r"brings its own code \(factory\.py\), .*pass --trust-remote-code"):
        find(folder, trust_remote_code=False)


def test_directories_of_transformers_are_not_for_factories(tiny_llama: Path) -> None:
    assert find_custom(ModelConfig(model=str(tiny_llama))) is None


def test_factory_is_called_once_to_be_served() -> None:
    calls = []

    def make() -> nn.Module:
        calls.append(1)
        return make_gpt()

    assert equal_state(load(make), make_gpt())
    assert len(calls) == 1


def test_weights_that_come_with_the_module_are_kept() -> None:
    made = make_gpt()
    with torch.no_grad():
        made.norm.weight.fill_(3)
    assert float(load(lambda: made).norm.weight[0]) == 3  # type: ignore[union-attr, index, arg-type]


def test_named_weights_go_before_the_modules_own(tmp_path: Path) -> None:
    state = make_gpt().state_dict()
    changed = {name: tensor + 1 for name, tensor in state.items()}
    module = load(make_gpt, save(changed, tmp_path / "changed"))
    assert not equal_state(module, make_gpt())
    module = load(make_gpt, save(changed, tmp_path / "changed"), weights=str(save(state, tmp_path / "first")))
    assert equal_state(module, make_gpt())
    with pytest.raises(CheckpointError, match=f"no weights at {tmp_path / 'nowhere'}"):
        load(make_gpt, weights=str(tmp_path / "nowhere"))


class LoadsItself:
    """A factory that reads a checkpoint with names of its own."""

    def __init__(self, whole: bool = True, says_so: bool = False) -> None:
        self.whole, self.says_so = whole, says_so

    def __call__(self, folder: str) -> Any:
        model = make_gpt()
        state = {name.removeprefix("theirs."): t for name, t in torch.load(f"{folder}/model.pt").items()}
        if self.says_so:
            for name, parameter in model.named_parameters():
                parameter.data.copy_(state[name])
            return model, {"has_weights": True}
        if self.whole:
            model.load_state_dict(state)
        else:
            model.norm.load_state_dict({"weight": torch.zeros(64), "bias": torch.zeros(64)})
        return model


@pytest.mark.parametrize("factory", [LoadsItself(), LoadsItself(says_so=True)])
def test_folder_whose_factory_loads_weights_itself_is_left_alone(
    tmp_path: Path, factory: LoadsItself, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / "gpt")
    (folder / "model.safetensors").unlink()
    changed = {name: tensor + 1 for name, tensor in make_gpt().state_dict().items()}
    torch.save({f"theirs.{name}": tensor for name, tensor in changed.items()}, folder / "model.pt")
    custom = find(folder)
    object.__setattr__(custom.factory, "function", factory)
    with caplog.at_level(logging.INFO, "shardwright"):
        module = custom.load(torch.float32)
    expected = make_gpt()
    expected.load_state_dict(changed)
    assert equal_state(module, expected)
    assert "loads weights itself: they are kept" in caplog.text


def test_part_that_is_loaded_by_the_factory_is_not_the_whole(tmp_path: Path) -> None:
    torch.save(make_gpt().state_dict(), tmp_path / "model.pt")
    assert equal_state(load(LoadsItself(whole=False), tmp_path), make_gpt())


def test_named_weights_go_before_what_the_factory_loads(tmp_path: Path) -> None:
    torch.save(make_gpt().state_dict(), tmp_path / "model.pt")
    changed = {name: tensor + 1 for name, tensor in make_gpt().state_dict().items()}
    chosen = save(changed, tmp_path / "chosen")
    module = load(lambda: LoadsItself()(str(tmp_path)), chosen)
    assert float(module.norm.weight[0]) == 2  # type: ignore[union-attr, index, arg-type]


class Awkward(nn.Module):
    """What cannot be built on meta, or not kept there."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        if kind == "value":
            self.scale = float(self.linear.weight.detach().sum())
        if kind == "buffer":
            self.register_buffer("mask", torch.empty(4, 4).fill_(1).triu(), persistent=False)
        if kind == "attribute":
            self.table = [torch.empty(4).fill_(2)]
        if kind == "alias":
            self.rnn = nn.LSTM(4, 4)


@pytest.mark.parametrize("kind", ["value", "buffer", "attribute", "alias"])
def test_code_that_cannot_run_on_meta_runs_for_real(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    source = Awkward(kind)
    torch.manual_seed(2)
    module = load(lambda: Awkward(kind), save(source.state_dict(), tmp_path))
    assert equal_state(module, source)
    assert not has_strays(module)
    if kind == "buffer":
        assert module.get_buffer("mask").sum() == 10
    if kind == "alias":
        x = torch.ones(1, 1, 4)
        assert torch.equal(module.rnn(x)[0], source.rnn(x)[0])  # type: ignore[operator]


def test_factory_that_fails_is_quoted_once(tmp_path: Path) -> None:
    def fail() -> nn.Module:
        raise ValueError("no such size")

    for weights in (None, save(make_gpt().state_dict(), tmp_path)):
        with pytest.raises(UnsupportedModelError, match="the factory of 'mine' failed: ValueError: no such size"):
            load(fail, weights)


@pytest.mark.parametrize("in_checkpoint", [torch.float32, torch.bfloat16])
def test_type_is_the_checkpoints_unless_asked(tmp_path: Path, in_checkpoint: torch.dtype) -> None:
    state = {name: tensor.to(in_checkpoint) for name, tensor in make_gpt().state_dict().items()}
    folder = save(state, tmp_path / "model")
    assert {p.dtype for p in load(make_gpt, folder).parameters()} == {in_checkpoint}
    assert {p.dtype for p in load(make_gpt, folder, dtype="float16").parameters()} == {torch.float16}


def test_type_of_a_module_with_weights_is_its_own() -> None:
    assert load(lambda: make_gpt().bfloat16()).norm.weight.dtype is torch.bfloat16  # type: ignore[union-attr]
    assert load(lambda: make_gpt().double()).norm.weight.dtype is torch.float32  # type: ignore[union-attr]


def test_casting_leaves_whole_and_complex_numbers_and_ties() -> None:
    module = make_gpt()
    shared = torch.ones(3)
    module.register_buffer("steps", torch.tensor(3))
    module.register_buffer("rope", torch.ones(3, dtype=torch.complex64))
    module.register_buffer("one", shared)
    module.norm.register_buffer("two", shared)
    cast_floats(module, torch.bfloat16)
    assert module.steps.dtype is torch.int64
    assert module.rope.dtype is torch.complex64
    assert module.one is module.norm.two
    assert module.one.dtype is torch.bfloat16
    assert module.head.weight is module.tokens.weight


def test_random_weights_need_no_checkpoint() -> None:
    module = load(make_gpt, load_format="dummy")
    assert not equal_state(module, make_gpt())
    assert 0.01 < float(module.tokens.weight.std()) < 0.03  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_model_of_a_factory(tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    source = LlamaForCausalLM(config)
    source.save_pretrained(tmp_path)
    module = load(lambda: LlamaForCausalLM(config), tmp_path)
    assert equal_state(module, source)
    assert (module.lm_head.weight is module.model.embed_tokens.weight) is tied  # type: ignore[union-attr]


def test_registration_is_checked() -> None:
    with pytest.raises(ConfigError, match="the name is '' but must be a text"):
        register_model("", make_gpt)
    with pytest.raises(ConfigError, match=r"register_model\('a'\): the factory is 3 but must be a function"):
        register_model("a", 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="vocab_size is 0 but must be a whole number of at least 1"):
        register_model("a", make_gpt, vocab_size=0)


def test_registered_name_that_is_misspelt_gets_the_right_one() -> None:
    register_model("my-gpt", make_gpt)
    with pytest.raises(ModelSourceError, match=r"there is no model 'my-gtp': did you mean my-gpt\?"):
        find("my-gtp")


def test_what_is_said_of_the_module_comes_along() -> None:
    register_model(
        "mine", lambda: (make_gpt(), {"max_model_len": 7, "num_layers": 3}), max_model_len=9, eos_token_ids=2
    )
    custom = find("mine")
    facts = custom.facts(custom.look())
    assert facts == {"vocab_size": None, "max_model_len": 9, "num_layers": 3, "eos_token_ids": (2,)}


def test_only_what_another_process_can_import_is_sent_there() -> None:
    register_model("fine", make_gpt)
    assert registry.portable("fine") is registry.registered("fine")
    assert registry.portable("smollm2-135m") is None
    register_model("inner", lambda: make_gpt())
    with pytest.raises(ConfigError, match=r"factory of 'inner' cannot be called in the engine's own process .*LLM"):
        registry.portable("inner")
