"""`shardwright inspect`: what a model is made of, and how it would be served."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from shardwright.cli.help import Command, examples
from shardwright.cli.inspect_steps import look_at_steps, show_steps
from shardwright.cli.options import Json, Model, engine_flags, with_flags
from shardwright.cli.output import announce, only_results_on_stdout, print_json, stdout
from shardwright.config import EngineConfig, ModelConfig
from shardwright.errors import UnsupportedModelError
from shardwright.garbage import start_of_process

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from shardwright.adapt.served_model import ServedModel
    from shardwright.cache.spec import LayerSpec
    from shardwright.plans.plan import ParallelPlan
    from shardwright.plans.structure import Node, Weight
    from shardwright.weight_format import WeightFormat
    from shardwright.worker.blueprint import Blueprint
    from shardwright.worker.step import StepModel

FLAGS = (
    "task", "revision", "dtype", "load_format", "weights", "weight_map", "trust_remote_code", "max_model_len",
    "tp_plan", "pp_plan", "quantization", "quantization_group_size", "device", "attention_backend",
)  # fmt: skip

EXAMPLES = examples(
    "shardwright inspect smollm2-135m",
    "shardwright inspect ./my-model --depth 3 --params",
    "shardwright inspect ./my-model --json | jq .attention",
)


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("inspect", cls=Command, epilog=EXAMPLES)(inspect)


@with_flags(engine=engine_flags(only=FLAGS))
@only_results_on_stdout()
def inspect(
    model: Model,
    *,
    depth: Annotated[int | None, typer.Option(min=0, help="Levels of the tree to show; default: all.")] = None,
    params: Annotated[bool, typer.Option("--params", help="Show name, shape and dtype of every parameter.")] = False,
    json: Json = False,
    engine: dict[str, Any],
) -> None:
    """Show a model's modules and sizes, which entry of its plan covers what, how its attention is captured, and what
    its cache needs.

    Layers that are built alike are shown once.
    """
    config = EngineConfig.from_options(model, **engine)
    announce(f"looking into {model}")
    report, tree, plan = look_into(config)
    if json:
        print_json({**report, "tree": tree.as_json(depth=depth, params=params)})
    else:
        show(report, tree, plan, depth=depth, params=params)


def look_into(config: EngineConfig) -> tuple[dict[str, Any], Node, ParallelPlan]:
    """What `inspect --json` says, its tree, and its plan. Raises a UsageError if the model cannot be built."""
    with start_of_process():
        from shardwright.models.task import resolve_task
        from shardwright.plans.choose import choose_plan
        from shardwright.plans.structure import structure_tree
        from shardwright.pooling.build import build_reader
        from shardwright.pooling.lengths import longest_text
        from shardwright.worker.blueprint import Blueprint

    blueprint = Blueprint.of(config.model)
    module: nn.Module
    task, max_model_len = "generate", blueprint.max_model_len
    if blueprint.custom is None and blueprint.path is not None:
        task = resolve_task(config.model.task, blueprint.config, blueprint.path)
    if task == "generate":
        module = blueprint.build(blueprint.dtype)
    else:
        assert blueprint.path is not None
        reader = build_reader(config.model, blueprint.config, blueprint.dtype, classifies=task == "classify")
        reader.tie_weights(recompute_mapping=False)
        module = reader
        max_model_len = longest_text(config.model.max_model_len, module, blueprint.config, blueprint.path)
    plan = choose_plan(module, tp_file=config.parallel.tp_plan, pp_file=config.parallel.pp_plan)
    tree = structure_tree(module, plan)
    text_config = blueprint.config.get_text_config()
    report: dict[str, Any] = {
        "model": config.model.model,
        "path": str(blueprint.path or ""),
        "task": task,
        "model_type": blueprint.config.model_type,
        "architecture": type(module).__name__,
        "dtype": str(blueprint.dtype).removeprefix("torch."),
        "parameters": tree.num_parameters,
        "weight_bytes": tree.num_bytes,
        "num_layers": blueprint.num_layers(module),
        "vocab_size": text_config.vocab_size,
        "max_model_len": max_model_len,
        "plan": {"tp": plan.tp_source, "pp": plan.pp_source},
    }
    if task == "generate":
        report |= describe_serving(blueprint, config.model, num_parameters=tree.num_parameters)
    else:
        how = {"rung": "none", "reason": "texts are read whole, without a cache"}
        report |= {"attention": how, "cache_groups": [cache_group("none")], "replaced": [], "kept": [], "steps": None}
    if config.model.weight_format is not None:
        quantized, replaced = describe_quantization(module, config.model.weight_format)
        report |= {"quantization": quantized, "replaced": report["replaced"] + replaced}
    return report, tree, plan


def describe_quantization(module: nn.Module, format: WeightFormat) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """What quantized linears come to, and which these are. Raises UnsupportedModelError if there are none."""
    from shardwright.plans.plan import ParallelPlan
    from shardwright.plans.quantization import quantization_of
    from shardwright.plans.resolve import resolve

    quantization = quantization_of(module, format)
    table = resolve(module, ParallelPlan(), [], quantization=quantization)
    names = [row.name.rpartition(".")[0] for row in table.parameters if row.quantized is not None]
    summary = {"format": str(format), "linears": len(names), "weight_bytes": table.weight_bytes(0, 0)}
    return summary, [{"module": name, "what": "linear", "by": str(format)} for name in names]


def describe_serving(blueprint: Blueprint, config: ModelConfig, *, num_parameters: int) -> dict[str, Any]:
    """How the attention of a model that generates would be captured, and what its cache needs."""
    from shardwright.worker.together import describe_launches
    from shardwright.worker.worker import attention_kernels, resolve_device

    try:
        served, loops = blueprint.capture(num_parameters=num_parameters)
    except UnsupportedModelError as error:
        rung = "per-request" if blueprint.is_large(num_parameters) else None
        how = {"rung": rung, "reason": str(error)}
        return {"attention": how, "cache_groups": [], "replaced": [], "kept": [], "steps": None}
    groups = [
        *paged_groups(served, element_bytes=blueprint.dtype.itemsize, max_model_len=blueprint.max_model_len),
        *state_groups(served, blueprint.config),
    ]
    described = describe_attention(served)
    device = resolve_device(config.device)
    backend = attention_kernels(served.layers, config, device, blueprint.dtype)
    described["attention"]["backend"] = backend
    described["replaced"] += [
        {"module": loop.name, "what": "experts", "by": f"{loop.num_experts} experts at once"}
        for loop in loops
        if not loop.reason
    ]
    if backend == "triton":
        grouped = [loop.name for loop in loops if not loop.reason]
        described["replaced"] += describe_launches(served, without=grouped)
    kept = [{"module": loop.name, "what": "experts", "reason": loop.reason} for loop in loops if loop.reason]
    steps = look_at_steps(served, blueprint, device=device, backend=backend)
    return {**described, "kept": kept, "cache_groups": groups or [cache_group("none")], "steps": steps}


def describe_attention(served: StepModel | ServedModel) -> dict[str, Any]:
    """How the attention of a model is captured, and what takes its place."""
    return {
        "attention": {"rung": served.rung, "reason": served.rung_reason},
        "replaced": [
            {"module": layer.name, "what": "attention", "by": f"{how_attended(layer)}, {layer.visibility.kind}"}
            for layer in served.layers
            if not layer.is_own
        ],
    }


def how_attended(layer: LayerSpec) -> str:
    """What takes the place of a layer's attention."""
    return "paged attention on latents" if layer.values_in_keys else "paged attention"


def cache_group(
    kind: str,
    *,
    window: int | None = None,
    layers: Sequence[int] = (),
    latent_layers: Sequence[int] = (),
    token: int = 0,
    request: int = 0,
) -> dict[str, Any]:
    """Layers that share blocks, those of them that cache latents, and the bytes that a token and a request take in
    all.
    """
    return {
        "kind": kind,
        "window": window,
        "layers": list(layers),
        "latent_layers": list(latent_layers),
        "bytes_per_token": token,
        "bytes_per_request": request,
    }


def paged_groups(
    served: StepModel | ServedModel, *, element_bytes: int, max_model_len: int
) -> Iterator[dict[str, Any]]:
    """Attention layers with blocks of keys and values, in groups of one window."""
    numbers = [layer_number(layer.name, default=i) for i, layer in enumerate(served.layers)]
    for group in served.groups:
        if group.layers:
            bytes_per_token = sum(served.layers[i].elements_per_token for i in group.layers) * element_bytes
            window = group.visibility.size
            yield cache_group(
                group.visibility.kind,
                window=window,
                layers=[numbers[i] for i in group.layers],
                latent_layers=[numbers[i] for i in group.layers if served.layers[i].values_in_keys],
                token=bytes_per_token,
                request=bytes_per_token * min(max_model_len, window or max_model_len),
            )


def layer_number(name: str, *, default: int) -> int:
    """The number in the name of a layer's module: 3 for `model.layers.3.self_attn`."""
    numbers = re.findall(r"\d+", name)
    return int(numbers[0]) if len(numbers) == 1 else default


def state_groups(served: StepModel | ServedModel, config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """Layers that carry a state of one size however long the request is, as measured in float32."""
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    if num_bytes := getattr(served, "bytes_per_row", 0):
        cache = DynamicCache(config=config.get_text_config(decoder=True))
        layers = [i for i, layer in enumerate(cache.layers) if isinstance(layer, LinearAttentionCacheLayerMixin)]
        yield cache_group("state", layers=layers, request=num_bytes)


def show(report: dict[str, Any], tree: Node, plan: ParallelPlan, *, depth: int | None, params: bool) -> None:
    """Print the report for people."""
    from shardwright.plans.quantities import count, size
    from shardwright.plans.tree_text import ARROW, note_of, tree_lines

    console = stdout()
    planned = note_of(plan)
    replaced = {entry["module"]: entry["by"] for entry in report["replaced"]}

    def note(item: Node | Weight) -> str:
        return "; ".join(filter(None, (planned(item), replaced_by(item, replaced))))

    for line in tree_lines(tree, depth=depth, params=params, note=note):
        what, arrow, said = line.partition(ARROW)
        console.print(Text.assemble(what, (f"{arrow}{said}", "green")), soft_wrap=True)
    attention = report["attention"]
    console.print(
        f"{report['architecture']} ({report['model_type']}): {count(report['parameters'])} parameters, "
        f"{size(report['weight_bytes'])} in {report['dtype']}, {report['num_layers'] or 'unnumbered'} layers, "
        f"up to {report['max_model_len']:,} tokens",
        markup=False,
        soft_wrap=True,
    )
    if (quantized := report.get("quantization")) is not None:
        console.print(
            f"quantized: {quantized['linears']} linears, {quantized['format']}; "
            f"{size(quantized['weight_bytes'])} of weights in all",
            markup=False,
            soft_wrap=True,
        )
    rung = attention["rung"] or "none, the model cannot be served yet"
    kernels = f" by {attention['backend']} kernels" if attention.get("backend") else ""
    console.print(f"attention: {rung}{kernels}: {attention['reason']}", markup=False, soft_wrap=True)
    for reason in dict.fromkeys(entry["reason"] for entry in report["kept"]):
        names = ", ".join(entry["module"] for entry in report["kept"] if entry["reason"] == reason)
        console.print(f"experts: {names} as written: {reason}", markup=False, soft_wrap=True)
    if report["steps"] is not None:
        show_steps(console, report["steps"])
    for group in report["cache_groups"]:
        if group["kind"] == "none":
            console.print("cache: none of ours; the model keeps its own, or does without")
            continue
        window = f" of {group['window']:,} tokens" if group["window"] else ""
        is_latent = group["latent_layers"] and group["latent_layers"] == group["layers"]
        kept = "layers of latents" if is_latent else "layers"
        console.print(
            f"cache: {group['kind']}{window}, {len(group['layers'])} {kept}: {size(group['bytes_per_token'])} a token, "
            f"at most {size(group['bytes_per_request'])} a request",
            markup=False,
            soft_wrap=True,
        )
    console.print(
        f"parallel plan: tensor {plan_from(plan.tp_source)}, pipeline {plan_from(plan.pp_source)}; "
        f"`shardwright plan check {report['model']} --tp 2 --pp 2` says whether it is right",
        markup=False,
        soft_wrap=True,
    )


def plan_from(source: str) -> str:
    """Where a part of the plan comes from."""
    return {"none": "none, would be inferred", "file": "from the file given"}.get(source, f"from the {source}")


def replaced_by(item: Node | Weight, replaced: dict[str, str]) -> str:
    """What takes the place of the modules that a node stands for."""
    served_by = [replaced[member] for member in getattr(item, "members", ()) if member in replaced]
    return ", ".join(by + (f" ({served_by.count(by)})" if len(served_by) > 1 else "") for by in sorted(set(served_by)))
