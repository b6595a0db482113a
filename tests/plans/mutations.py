"""Good plans with one mistake each: what was changed, and the entry that a check must name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from tests.plans.semantic import semantic_model
from tests.zoo.architectures import FULL, MIXED, OWN_ATTENTION, SLIDING, STATES
from tests.zoo.builder import make_config
from torch import nn

from shardwright.models.build import build_module
from shardwright.plans import ParallelPlan
from shardwright.plans.plan import PipelineEntry

ARCHITECTURES = FULL | SLIDING | MIXED | OWN_ATTENTION | STATES

Entries = dict[str, str]
Pipeline = dict[str, PipelineEntry]


@dataclass(frozen=True)
class Mutation:
    """A mistake in the plan of a model."""

    model: str
    name: str
    apply: Callable[[ParallelPlan], ParallelPlan]
    guilty: str
    """What a finding must name."""
    severity: str = "error"
    tp: int = 2
    pp: int = 2
    pp_split: tuple[int, ...] | None = None

    @property
    def id(self) -> str:
        return f"{self.model}: {self.name}"


def build(model: str) -> nn.Module:
    """A model on "meta": one of the zoo, or a semantic one."""
    if model.startswith("semantic"):
        return semantic_model(container="dict" if model.endswith("dict") else "list", tied=model.endswith("tied"))
    made = build_module(make_config(model, ARCHITECTURES[model]), torch.float32, trust_remote_code=False)
    made.tie_weights(recompute_mapping=False)
    return made


def tp(change: Callable[[Entries], Any]) -> Callable[[ParallelPlan], ParallelPlan]:
    """A change of the tensor-parallel entries, in place."""

    def apply(plan: ParallelPlan) -> ParallelPlan:
        entries = dict(plan.tp)
        change(entries)
        return replace(plan, tp=entries, tp_source="file")

    return apply


def pp(change: Callable[[Pipeline], Pipeline]) -> Callable[[ParallelPlan], ParallelPlan]:
    """Other pipeline entries."""
    return lambda plan: replace(plan, pp=change(dict(plan.pp)), pp_source="file")


def drop(pattern: str) -> Callable[[ParallelPlan], ParallelPlan]:
    return tp(lambda entries: entries.pop(pattern))


def style(pattern: str, word: str) -> Callable[[ParallelPlan], ParallelPlan]:
    return tp(lambda entries: entries.update({pattern: word}))


def rename(old: str, new: str) -> Callable[[ParallelPlan], ParallelPlan]:
    return tp(lambda entries: entries.update({new: entries.pop(old)}))


def stage(old: str, new: str) -> Callable[[ParallelPlan], ParallelPlan]:
    return pp(lambda entries: {new if name == old else name: entry for name, entry in entries.items()})


def sides(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Callable[[ParallelPlan], ParallelPlan]:
    return pp(lambda entries: entries | {name: PipelineEntry(inputs, outputs)})


def no_split(*classes: str) -> Callable[[ParallelPlan], ParallelPlan]:
    return lambda plan: replace(plan, no_split=frozenset(classes))


def first(name: str) -> Callable[[ParallelPlan], ParallelPlan]:
    return pp(lambda entries: {name: entries[name], **entries})


def last(name: str) -> Callable[[ParallelPlan], ParallelPlan]:
    return pp(lambda entries: {n: e for n, e in entries.items() if n != name} | {name: entries[name]})


def same(plan: ParallelPlan) -> ParallelPlan:
    return plan


A = "causal_lm.layer_stack.layers.*.attention"
F = "causal_lm.layer_stack.layers.*.feedforward"
LAYERS = "causal_lm.layer_stack.layers"
L = "model.layers.*"

MUTATIONS = [
    Mutation("semantic", "drop the output", drop(f"{A}.output_linear"), f"{A}.output_linear"),
    Mutation("semantic", "drop the query", drop(f"{A}.query_linear"), f"{A}.query_linear"),
    Mutation("semantic", "drop up beside gate", drop(f"{F}.up"), f"{F}.up"),
    Mutation("semantic", "query by rows", style(f"{A}.query_linear", "rowwise"), f"{A}.query_linear"),
    Mutation("semantic", "output by columns", style(f"{A}.output_linear", "colwise"), f"{A}.output_linear"),
    Mutation("semantic", "down by columns", style(f"{F}.down", "colwise"), f"{F}.down"),
    Mutation("semantic", "gate by rows", style(f"{F}.gate", "rowwise"), f"{F}.gate"),
    Mutation("semantic", "output splits parts", style(f"{A}.output_linear", "rowwise_rep"), f"{A}.output_linear"),
    Mutation("semantic", "key gathered", style(f"{A}.key_linear", "colwise_rep"), f"{A}.key_linear"),
    Mutation("semantic", "value whole", style(f"{A}.value_linear", "replicate"), f"{A}.value_linear"),
    Mutation("semantic", "typo in the query", rename(f"{A}.query_linear", f"{A}.query_liner"), f"{A}.query_liner"),
    Mutation("semantic", "gate at the wrong depth", rename(f"{F}.gate", "causal_lm.layer_stack.*.feedforward.gate"),
             "causal_lm.layer_stack.*.feedforward.gate"),
    Mutation("semantic", "typo in the head", rename("lm_head", "lm_heat"), "lm_heat"),
    Mutation("semantic", "logits in parts", style("lm_head", "colwise"), "lm_head"),
    Mutation("semantic", "embedding as a linear", style("causal_lm.embedding", "colwise"), "causal_lm.embedding"),
    Mutation("semantic", "a norm cut", style("causal_lm.layer_stack.final_norm", "colwise"),
             "causal_lm.layer_stack.final_norm"),
    Mutation("semantic", "a container cut", style(A, "colwise"), A),
    Mutation("semantic", "attention added up twice", style(A, "all_reduce"), A),
    Mutation("semantic", "bias added twice", tp(lambda e: e.update({
        f"{A}.output_linear.weight": e.pop(f"{A}.output_linear"), f"{A}.output_linear": "all_reduce"})),
        f"{A}.output_linear.bias"),
    Mutation("semantic", "no entry for the MLP", tp(lambda e: [e.pop(f"{F}.{n}") for n in ("gate", "up", "down")]),
             f"{F}.gate", severity="warning"),
    Mutation("semantic", "more ranks than heads", same, f"{A}.query_linear", tp=5, pp=1),
    Mutation("semantic", "more stages than layers", same, LAYERS, pp=5),
    Mutation("semantic", "a split of other layers", same, "pp_split 3,3", pp_split=(3, 3)),
    Mutation("semantic", "typo in the layers", stage(LAYERS, "causal_lm.layer_stack.layres"),
             "causal_lm.layer_stack.layres"),
    Mutation("semantic", "layers at the wrong depth", stage(LAYERS, "causal_lm.layers"), "causal_lm.layers"),
    Mutation("semantic", "one layer for all", stage(LAYERS, f"{LAYERS}.0"), f"{LAYERS}.0"),
    Mutation("semantic", "no layers", pp(lambda e: {n: x for n, x in e.items() if n != LAYERS}), LAYERS),
    Mutation("semantic", "no embedding", pp(lambda e: {n: x for n, x in e.items() if "embedding" not in n}),
             "causal_lm.embedding", severity="warning"),
    Mutation("semantic", "head on the first stage", first("lm_head"), "lm_head"),
    Mutation("semantic", "norm on the first stage", first("causal_lm.layer_stack.final_norm"),
             "causal_lm.layer_stack.final_norm"),
    Mutation("semantic", "embedding on the last stage", last("causal_lm.embedding"), "causal_lm.embedding"),
    Mutation("semantic", "input missing", sides(LAYERS, ("attention_mask",), ("hidden_states",)), LAYERS),
    Mutation("semantic", "typo in an input", sides(LAYERS, ("hidden_state",), ("hidden_states",)), LAYERS),
    Mutation("semantic", "an input nobody takes", sides(LAYERS, ("hidden_states", "cache"), ("hidden_states",)),
             LAYERS),
    Mutation("semantic", "an output nobody takes", sides(LAYERS, ("hidden_states",), ("hidden",)), LAYERS),
    Mutation("semantic", "embedding gives another name", sides("causal_lm.embedding", ("input_ids",), ("x",)),
             "causal_lm.embedding"),
    Mutation("semantic", "typo in no_split", no_split("PreLNLayr"), "no_split PreLNLayr", severity="warning"),
    Mutation("semantic", "no_split of the whole", no_split("CausalLM"), "no_split CausalLM"),
    Mutation("semantic dict", "drop the key", drop(f"{A}.key_linear"), f"{A}.key_linear"),
    Mutation("semantic dict", "typo in up", rename(f"{F}.up", f"{F}.upp"), f"{F}.upp"),
    Mutation("semantic dict", "typo in the layers", stage(LAYERS, "causal_lm.layer_stack.layer"),
             "causal_lm.layer_stack.layer"),
    Mutation("semantic tied", "tied weights cut differently", style("causal_lm.embedding", "embedding_colwise"),
             "causal_lm.embedding"),
    Mutation("llama", "drop down", drop(f"{L}.mlp.down_proj"), f"{L}.mlp.down_proj"),
    Mutation("llama", "one layer forgets", tp(lambda e: e.update({"model.layers.1.self_attn.o_proj": "replicate"})),
             "model.layers.1.self_attn.o_proj"),
    Mutation("phi3", "down by columns", style(f"{L}.mlp.down_proj", "colwise"), f"{L}.mlp.down_proj"),
    Mutation("phi3", "fused gate and up by rows", style(f"{L}.mlp.gate_up_proj", "rowwise"), f"{L}.mlp.gate_up_proj"),
    Mutation("mixtral", "experts' first matrix dropped", drop(f"{L}.mlp.experts.gate_up_proj"),
             f"{L}.mlp.experts.gate_up_proj"),
    Mutation("mixtral", "experts never added up", drop(f"{L}.mlp.experts"), f"{L}.mlp.experts"),
    Mutation("mixtral", "whole experts added up", tp(lambda e: [e.pop(f"{L}.mlp.experts.{n}") for n in
             ("gate_up_proj", "down_proj")]), f"{L}.mlp.experts"),
    Mutation("qwen3_moe", "typo in the experts", rename(f"{L}.mlp.experts.down_proj", f"{L}.mlp.expert.down_proj"),
             f"{L}.mlp.expert.down_proj"),
    Mutation("gemma2", "value left out of its group", style(f"{L}.self_attn.v_proj", "replicate"),
             f"{L}.self_attn.v_proj"),
]  # fmt: skip
