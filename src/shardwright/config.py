"""Engine options: frozen records, checked once.

Each component takes its own record. The CLI's engine flags and the keyword arguments of `LLM` are both derived from the
fields here (`EngineConfig.from_options`), so a field is a promise: name, default and help text live in one place.
Values of "auto" and None are resolved once, by the engine, into what `shardwright serve` logs at start; nothing writes
to a record afterwards.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from shardwright.errors import ConfigError
from shardwright.weight_format import WeightFormat

DType = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "safetensors", "pt", "dummy"]
Quantization = Literal["none", "int8", "int4"]
Policy = Literal["fcfs", "priority"]
KVCacheType = Literal["auto", "fp8"]
Task = Literal["auto", "generate", "embed", "classify"]
PoolingType = Literal["auto", "mean", "cls", "last"]
ExecutorBackend = Literal["auto", "inline", "mp", "ray"]
AttentionBackendName = Literal["auto", "native", "triton", "torch"]
SpeculativeMethod = Literal["none", "ngram", "draft"]

CPU_STEP_TOKENS = 8
"""Tokens of a step that take as long to multiply as the weights to read: GEMM rate over memory bandwidth, with weights
of two bytes. 5.7 were measured with AVX2, 12 with AVX512-BF16."""

GPU_STEP_TOKENS = 256
"""The same, by the data sheets of current GPUs."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def option(default: Any, help: str) -> Any:
    """A field that is also a command-line flag and a keyword argument."""
    return field(default=default, metadata={"help": help})


def parse_bytes(text: str | int) -> int:
    """Bytes from an integer or a size such as `512MiB`, `2GiB` or `4GB`. Raises ConfigError."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a size in bytes: write 2147483648, 2GiB or 512MiB")
    number, prefix, binary = match.groups()
    power = " kmgt".index(prefix.lower() or " ")
    return int(float(number) * (1024 if binary else 1000) ** power)


def check_positive(record: Any, *names: str) -> None:
    """Raise ConfigError if one of the named fields is set and below 1."""
    for name in names:
        value = getattr(record, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} is {value!r} but must be a whole number of at least 1")


def check_choice(record: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError if the named field is none of the choices."""
    value = getattr(record, name)
    if value not in choices:
        raise ConfigError(f"{name} is {value!r} but must be one of: {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model, and how it is built."""

    model: str
    """A directory, a hub id, `package.module:factory`, a registered name, or `smollm2-135m`, the starter model."""
    tokenizer: str | None = option(None, "Directory or hub id of the tokenizer; default: the model's own.")
    revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    dtype: DType = option("auto", "Type of weights and activations; auto: what the checkpoint says.")
    load_format: LoadFormat = option(
        "auto",
        "Which weights are read: safetensors, pt (of torch.save), auto (the one, else the other); or dummy: random "
        "ones, to try a configuration without its checkpoint.",
    )
    weights: str | None = option(None, "Folder or file of the weights; default: the model's directory.")
    weight_map: str | None = option(
        None, "JSON or YAML file that renames or joins weights; default: rename.json or rename.yaml beside them."
    )
    quantization: Quantization = option(
        "none", "Keep the weights of linears in 8 or 4 bits: less memory and faster steps, at some loss of precision."
    )
    quantization_group_size: int = option(
        32, "Input features of a quantized weight that share a scale: fewer are more precise, and take more memory."
    )
    trust_remote_code: bool = option(False, "Run the modeling code that lies in the model directory.")
    max_model_len: int | None = option(
        None, "Most tokens of prompt and output together; default: what the model's config allows."
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where the model runs; auto: a GPU if there is one.")
    attention_backend: AttentionBackendName = option(
        "auto",
        "What computes attention: native (kernels for CPUs), triton (for GPUs), torch (its own operators); auto: what "
        "suits the device.",
    )
    enforce_eager: bool = option(
        False,
        "Run the model's own code in every step, instead of recording steps and repeating them (natively on a CPU, as "
        "graphs on a GPU).",
    )
    compile_layers: bool = option(
        False,
        "Compile a decoder layer with torch.compile, for all to use: fewer kernels in a step, for a longer start.",
    )
    seed: int = option(0, "Seed of sampling for requests that give none.")
    self_check: bool = option(
        True,
        "At start, compare the served model with its own untouched code on a few random tokens; without it, the first "
        "way of serving that can be built is taken, right or wrong.",
    )
    task: Task = option("auto", "What the model is for: generating, embedding or classifying texts; auto: its config.")

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("no model given: name a directory, a hub id, or smollm2-135m")
        check_choice(self, "task", ("auto", "generate", "embed", "classify"))
        check_choice(self, "dtype", ("auto", "float32", "bfloat16", "float16"))
        check_choice(self, "load_format", ("auto", "safetensors", "pt", "dummy"))
        check_choice(self, "device", ("auto", "cpu", "cuda"))
        check_choice(self, "attention_backend", ("auto", "native", "triton", "torch"))
        check_choice(self, "quantization", ("none", "int8", "int4"))
        check_positive(self, "max_model_len", "quantization_group_size")

    @property
    def weight_format(self) -> WeightFormat | None:
        """Of quantized linears; None: they stay as they are."""
        match self.quantization:
            case "int8":
                return WeightFormat(8, self.quantization_group_size)
            case "int4":
                return WeightFormat(4, self.quantization_group_size)
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Memory for keys and values."""

    block_size: int = option(16, "Tokens per block of the KV cache.")
    kv_cache_dtype: KVCacheType = option(
        "auto",
        "Type of keys and values in the cache: auto (the model's) or fp8 (e4m3, 8 bits; by Triton's kernels alone).",
    )
    kv_cache_memory_bytes: int | None = option(
        None, "Memory for the KV cache, e.g. 2GiB; default: measured from what is free once the model is loaded."
    )
    gpu_memory_utilization: float = option(
        0.9, "Share of the device's memory that weights, activations and KV cache may fill (GPU only)."
    )
    enable_prefix_caching: bool = option(True, "Reuse keys and values of prompts that begin alike.")

    def __post_init__(self) -> None:
        check_positive(self, "block_size", "kv_cache_memory_bytes")
        check_choice(self, "kv_cache_dtype", ("auto", "fp8"))
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization} but must be over 0 and at most 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """What may run together in one step."""

    max_num_seqs: int = option(64, "Most sequences running at once.")
    max_num_batched_tokens: int | None = option(
        None, "Most tokens computed in one step; default: 2048, or max_model_len without chunked prefill."
    )
    enable_chunked_prefill: bool = option(True, "Split long prompts over steps, beside running decodes.")
    scheduling_policy: Policy = option("fcfs", "fcfs: first come, first served; priority: lowest number first.")
    async_scheduling: bool | None = option(
        None,
        "Plan each step, and send what the last one brought, while the one between runs; a new request may wait a step "
        "longer. One rank without speculation can; default: it does on a GPU.",
    )

    def __post_init__(self) -> None:
        check_positive(self, "max_num_seqs", "max_num_batched_tokens")
        check_choice(self, "scheduling_policy", ("fcfs", "priority"))
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs, which is "
                f"{self.max_num_seqs}: every running sequence needs one token a step"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculativeConfig:
    """How tokens are guessed ahead, which the model then verifies several at a time."""

    speculative_method: SpeculativeMethod = option(
        "none",
        "Guess tokens ahead, for the model to verify together: ngram (what followed when the same tokens stood there "
        "before), draft (by a smaller model), or none; a speculative model implies draft.",
    )
    speculative_model: str | None = option(
        None, "The smaller model: a directory or hub id, with the same vocabulary as the model."
    )
    num_speculative_tokens: int = option(4, "Most tokens guessed ahead for a request; those that go wrong get fewer.")
    prompt_lookup_max: int = option(4, "Most tokens that are looked for earlier in the sequence (ngram).")
    prompt_lookup_min: int = option(2, "Fewest tokens that are looked for earlier in the sequence (ngram).")
    speculative_step_tokens: int | None = option(
        None,
        "Guess no more than fill a step of decodes up to so many tokens, as beyond that every token costs time; "
        "default: 8 on a CPU, 256 on a GPU.",
    )

    def __post_init__(self) -> None:
        check_choice(self, "speculative_method", ("none", "ngram", "draft"))
        check_positive(
            self, "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min", "speculative_step_tokens"
        )
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min is {self.prompt_lookup_min}, more than prompt_lookup_max, which is "
                f"{self.prompt_lookup_max}"
            )
        if self.speculative_method == "draft" and self.speculative_model is None:
            raise ConfigError("speculative_method is draft but no model drafts: name one with --speculative-model")
        if self.speculative_method == "ngram" and self.speculative_model is not None:
            raise ConfigError(
                f"speculative_method is ngram but speculative_model is {self.speculative_model}: give one of the two"
            )

    @property
    def method(self) -> SpeculativeMethod:
        """The method, also where only a model is named."""
        return "draft" if self.speculative_model is not None else self.speculative_method

    def step_tokens(self, device: str) -> int:
        """Tokens up to which steps of decodes are filled with guesses on a device."""
        if self.speculative_step_tokens is not None:
            return self.speculative_step_tokens
        return CPU_STEP_TOKENS if device.startswith("cpu") else GPU_STEP_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolingConfig:
    """How a model that embeds makes one vector of a text."""

    pooling: PoolingType = option(
        "auto",
        "Which tokens make a text's embedding; auto: as the model's sentence-transformers files say, else the last one "
        "if tokens see only what is before them, else the mean.",
    )
    normalize: bool | None = option(
        None, "Scale embeddings to length 1; default: as sentence-transformers' files say, yes without them."
    )

    def __post_init__(self) -> None:
        check_choice(self, "pooling", ("auto", "mean", "cls", "last"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How many ranks share the model, and how it is cut."""

    tensor_parallel_size: int = option(1, "Ranks that share every layer.")
    pipeline_parallel_size: int = option(1, "Stages that the layers are divided into, one after another.")
    data_parallel_size: int = option(1, "Copies of the whole, each with its own cache, behind one server.")
    distributed_executor_backend: ExecutorBackend = option(
        "auto", "Where ranks run: inline (one, in this process), mp (processes of this machine), ray (a Ray cluster)."
    )
    tp_plan: str | None = option(None, "JSON or YAML file with the tensor-parallel plan; it replaces the model's own.")
    pp_plan: str | None = option(None, "JSON or YAML file with the pipeline plan; it replaces the model's own.")
    pp_split: str | None = option(None, "Layers per pipeline stage, e.g. 8,8,7,7; default: balanced by bytes.")
    enable_expert_parallel: bool = option(
        False, "Deal whole experts to the tensor-parallel ranks where the model's plan allows, instead of cutting each."
    )
    ray_address: str | None = option(
        None, "Address of a running Ray cluster (host:port, or auto); default: RAY_ADDRESS, else Ray on this machine."
    )

    def __post_init__(self) -> None:
        check_positive(self, "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
        check_choice(self, "distributed_executor_backend", ("auto", "inline", "mp", "ray"))
        if self.distributed_executor_backend == "inline" and self.num_ranks > 1:
            raise ConfigError(
                f"distributed_executor_backend is inline but {self.num_ranks} ranks share the model: use mp or ray"
            )
        if self.layers_per_stage is not None and len(self.layers_per_stage) != self.pipeline_parallel_size:
            raise ConfigError(
                f"pp_split {self.pp_split} names {len(self.layers_per_stage)} stages but pipeline_parallel_size is "
                f"{self.pipeline_parallel_size}"
            )

    @property
    def num_ranks(self) -> int:
        """Of one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def layers_per_stage(self) -> tuple[int, ...] | None:
        """What `pp_split` says. Raises ConfigError if it is no list of numbers."""
        if self.pp_split is None:
            return None
        try:
            return tuple(int(part) for part in self.pp_split.split(","))
        except ValueError:
            raise ConfigError(f"pp_split is {self.pp_split!r} but must be layers per stage, such as 8,8,7,7") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """All that one engine needs."""

    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.scheduler.async_scheduling:
            if self.speculative.method != "none":
                raise ConfigError(
                    "async_scheduling and speculation exclude each other: tokens are guessed after known ones"
                )
            if self.parallel.num_ranks > 1 or self.parallel.distributed_executor_backend not in ("auto", "inline"):
                raise ConfigError(
                    "async_scheduling is for one rank inside the engine; ranks of their own get steps one by one"
                )

    @property
    def of_draft(self) -> EngineConfig:
        """What a model that drafts is made from: as the served one, but whole on its rank, from files of its own."""
        model = dataclasses.replace(
            self.model,
            model=self.speculative.speculative_model or "",
            tokenizer=None,
            revision=None,
            weights=None,
            weight_map=None,
            max_model_len=None,
        )
        return dataclasses.replace(self, model=model, parallel=ParallelConfig())

    @classmethod
    def from_options(cls, model: str, **options: Any) -> EngineConfig:
        """Build the records from flat options, named as the fields.

        Raises: ConfigError for an unknown option (with the nearest name) or a bad value.
        """
        known = {f.name: part for part, f in engine_options()}
        if unknown := [name for name in options if name not in known]:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f": did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown engine option {unknown[0]!r}{hint}")
        if isinstance(options.get("kv_cache_memory_bytes"), str):
            options["kv_cache_memory_bytes"] = parse_bytes(options["kv_cache_memory_bytes"])
        parts: dict[str, dict[str, Any]] = {name: {} for name in RECORDS}
        parts["model"]["model"] = model
        for name, value in options.items():
            parts[known[name]][name] = value
        return cls(**{name: record(**parts[name]) for name, record in RECORDS.items()})


RECORDS: dict[str, type] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "speculative": SpeculativeConfig,
    "pooling": PoolingConfig,
    "parallel": ParallelConfig,
}
"""Per field of EngineConfig, its class."""


def engine_options() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every option of the engine as (name of its record, field), in the order of `--help`."""
    for part, record in RECORDS.items():
        for f in dataclasses.fields(record):
            if "help" in f.metadata:
                yield part, f
