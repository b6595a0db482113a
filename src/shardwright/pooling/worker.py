"""From a configuration to a model that can read texts: build, load, see how it pools, check."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from shardwright.config import EngineConfig, PoolingConfig
from shardwright.engine.messages import EngineInfo, PoolingInfo, PoolingRequest
from shardwright.errors import UnsupportedModelError
from shardwright.layers.cpu_linears import keep_unpacked, replace_linears
from shardwright.layers.quantized_linear import quantizable_linears, quantize_linears
from shardwright.loading.checkpoint import checkpoint_path
from shardwright.loading.load import weight_bytes
from shardwright.models.build import resolve_dtype
from shardwright.pooling.batching import Batching
from shardwright.pooling.build import build_reader, fill_reader
from shardwright.pooling.check import choose_batching, read_ahead
from shardwright.pooling.embedding import EmbeddingHead
from shardwright.pooling.lengths import longest_text
from shardwright.pooling.model import PoolingModel
from shardwright.pooling.sentence_config import PoolingMode, SentenceConfig, nested_dimensions, read_sentence_config
from shardwright.worker.worker import DEFAULT_BATCHED_TOKENS, resolve_device

logger = logging.getLogger(__name__)

WITHOUT_FILES = SentenceConfig(tail=[("Normalize", Path())])
"""For models that sentence-transformers has not written."""


class PoolingWorker:
    """A model that embeds or classifies, loaded and checked.

    Args:
        config: of the engine.
        path: the model's directory.
        model_config: read from it.
        classifies: whether the model is a classifier, or embeds.

    Raises: a UsageError for models, weights and options that do not work, before anything is served.
    """

    def __init__(self, config: EngineConfig, path: Path, model_config: PretrainedConfig, *, classifies: bool) -> None:
        started = time.perf_counter()
        device = resolve_device(config.model.device)
        weights = checkpoint_path(config.model.weights or path)
        dtype = resolve_dtype(config.model.dtype, model_config, weights)
        sentence = (None if classifies else read_sentence_config(path)) or WITHOUT_FILES
        module = build_reader(config.model, model_config, dtype, classifies=classifies)
        fill_reader(module, config.model, weights, dtype, is_part=not classifies)
        num_parameters = sum(p.numel() for p in module.parameters())
        if (weight_format := config.model.weight_format) is not None:
            quantize_linears(module, quantizable_linears(module), weight_format)
        torch.nn.Module.to(module, device)
        if device.type == "cpu":
            replace_linears(module)
        vocab_size = getattr(model_config.get_text_config(), "vocab_size", None)
        if not isinstance(vocab_size, int):
            raise UnsupportedModelError(
                f"{config.model.model}: its config names no vocab_size, so no tokens can be checked"
            )
        try:
            head = None if classifies else make_head(module, sentence, config.pooling, vocab_size).to(device)
            self._model = PoolingModel(module, head)
            self.batching = Batching.PADDED
            if config.model.self_check:
                self.batching = choose_batching(self._model, vocab_size=vocab_size)
            else:
                logger.warning("that texts read together get the numbers that they get alone was not verified")
        except UnsupportedModelError as exc:
            raise UnsupportedModelError(
                f"{config.model.model} ({model_config.model_type}) cannot be served: {exc}"
            ) from exc
        keep_unpacked(module)
        self.info = EngineInfo(
            model=config.model.model,
            path=str(path),
            model_type=model_config.model_type,
            architecture=type(module).__name__,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            num_parameters=num_parameters,
            weight_bytes=weight_bytes(module),
            vocab_size=vocab_size,
            max_model_len=longest_text(config.model.max_model_len, module, model_config, path),
            block_size=config.cache.block_size,
            num_blocks=0,
            kv_cache_bytes=0,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS,
            attention_rung="none",
            attention_reason=f"texts are read whole, without a cache, {self.batching}",
            task="classify" if classifies else "embed",
            pooling=classifier_info(model_config) if head is None else embedding_info(head, sentence, model_config),
        )
        log_start(self.info, ready_s=time.perf_counter() - started)

    def execute(self, requests: Sequence[PoolingRequest]) -> Tensor:
        """Read texts. Returns [len(requests), size], float32, on the CPU."""
        return self._model.compute(requests)


def make_head(
    module: PreTrainedModel, sentence: SentenceConfig, options: PoolingConfig, vocab_size: int
) -> EmbeddingHead:
    """How embeddings are made: as the user says, else the model's files, else by whether its tokens look ahead.

    Raises: UnsupportedModelError if the module cannot be run, or the files ask for what is not served.
    """
    hidden_size, looks_ahead = read_ahead(module, vocab_size=vocab_size)
    if options.pooling != "auto":
        mode = PoolingMode(options.pooling)
    else:
        mode = sentence.mode or (PoolingMode.MEAN if looks_ahead else PoolingMode.LAST)
    return EmbeddingHead(mode, hidden_size, sentence.tail, normalize=options.normalize)


def embedding_info(head: EmbeddingHead, sentence: SentenceConfig, config: PretrainedConfig) -> PoolingInfo:
    """What callers need to know of an embedder."""
    dimensions = sentence.dimensions if sentence.dimensions is not None else nested_dimensions(config.to_dict())
    return PoolingInfo(
        size=min(head.size, sentence.truncate_dim or head.size),
        pooling=head.mode,
        normalize=head.normalizes,
        dimensions=dimensions,
    )


def classifier_info(config: PretrainedConfig) -> PoolingInfo:
    """What callers need to know of a classifier.

    sentence-transformers notes in a cross-encoder's config what makes a score of its logit; the sigmoid, if nothing.
    """
    noted = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    activation = noted or getattr(config, "sbert_ce_default_activation_function", None) or ""
    labels = [str(label) for _, label in sorted((config.id2label or {}).items())]
    return PoolingInfo(
        size=len(labels),
        labels=labels,
        is_multi_label=len(labels) == 1 or config.problem_type == "multi_label_classification",
        scores_are_logits=activation.endswith("Identity"),
    )


def log_start(info: EngineInfo, *, ready_s: float) -> None:
    """Tell once what is served and how."""
    assert info.pooling is not None
    logger.info(
        "%s: %s, %.1f M parameters in %s on %s; %s, up to %s tokens; ready in %.1f s",
        info.model,
        info.architecture,
        info.num_parameters / 1e6,
        info.dtype,
        info.device,
        f"labels {', '.join(info.pooling.labels)}"
        if info.task == "classify"
        else f"embeddings of {info.pooling.size} numbers by {info.pooling.pooling} pooling",
        f"{info.max_model_len:,}",
        ready_s,
    )
