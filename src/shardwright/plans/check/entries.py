"""Entries of the tensor-parallel plan, each by itself: do they name something, and can it be cut so."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from shardwright.plans.check.findings import Finding, Severity
from shardwright.plans.check.subject import Subject, is_linear, is_typo, line
from shardwright.plans.resolve import acts
from shardwright.plans.styles import COLUMN, EMBEDDING, VOCABULARY, Cut

OLD_WORDS = {
    "colwise_rep": "colwise_gather_output",
    "rowwise_rep": "rowwise_split_input",
    "local_colwise": "colwise",
    "local_packed_colwise": "packed_colwise",
    "local_packed_rowwise": "packed_rowwise",
    "gather": "all_reduce",
    "local": "replicate",
    "replicated": "replicate",
    "sequence_parallel": "replicate",
}
"""Words of Transformers v4, and those of v5 that mean the same."""


def check_entries(subject: Subject) -> Iterator[Finding]:
    """Entries that match nothing, and styles that cannot apply to what they name."""
    for pattern, names in subject.matched.items():
        if not names:
            yield _unmatched(subject, pattern)
            continue
        modules = [subject.modules[name] for name in names if name in subject.modules]
        if modules and (found := _misapplied(subject, pattern, names, modules)):
            yield found
    if old := [word for word in dict.fromkeys(subject.plan.tp.values()) if word in OLD_WORDS]:
        yield Finding(
            Severity.NOTE,
            "tp_plan",
            f"words of Transformers v4, which still work: {', '.join(old)}",
            "\n".join(f'"{word}" is now "{OLD_WORDS[word]}"' for word in old),
        )


def _unmatched(subject: Subject, pattern: str) -> Finding:
    cause = f"tp {pattern}"
    meant = next((name for name, typo in subject.typos.items() if typo == pattern), None)
    if meant is not None and any(subject.lacking(w) == meant for w in subject.weights if _is_cuttable(subject, w.name)):
        is_wrong = is_typo(pattern, meant) or not any(subject.matched.values())
        message = f"matches nothing; {meant} is in the model, in no entry, and so whole on every rank"
        severity = Severity.ERROR if is_wrong else Severity.WARNING
        return Finding(severity, pattern, message, line(meant, subject.plan.tp[pattern]), cause)
    hint = f"; the nearest name in the model is {meant}" if meant is not None else ""
    message = f"matches nothing, so it says nothing of this model{hint}"
    return Finding(Severity.NOTE, pattern, message, "leave it out", cause)


def _is_cuttable(subject: Subject, name: str) -> bool:
    return any(parameter == name for parameter, _ in subject.grouped)


def _misapplied(subject: Subject, pattern: str, names: list[str], modules: list[nn.Module]) -> Finding | None:
    """What is wrong with a style on modules of these kinds."""
    style, module = subject.plan.styles[pattern], modules[0]
    kind, cause = type(module).__name__, f"tp {pattern}"
    word = subject.plan.tp[pattern]
    if style.cut is Cut.NONE:
        return None
    if not any(True for _ in module.parameters(recurse=False)):
        below = [name for name, _ in module.named_modules() if name and is_linear(module.get_submodule(name))]
        fix = "\n".join(line(f"{pattern}.{name}", word) for name in dict.fromkeys(below[:4])) if not acts(style) else ""
        return Finding(
            Severity.ERROR,
            pattern,
            f"is {kind}, which holds no weights itself: {word} cuts nothing there",
            fix or "name the linears in it",
            cause,
        )
    if isinstance(module, nn.Embedding) != (style.cut in (Cut.VOCABULARY, Cut.EMBEDDING)):
        if isinstance(module, nn.Embedding):
            better = EMBEDDING if style.is_column else VOCABULARY
            message = f"is an embedding, which {word} does not fit"
        elif is_linear(module):
            better, message = COLUMN, f"is a linear, and {word} is for embeddings"
        else:
            return None
        return Finding(Severity.ERROR, pattern, message, line(pattern, better.name), cause)
    if _is_norm(module) and not any(_is_cuttable(subject, f"{name}.weight") for name in names):
        return Finding(
            Severity.ERROR,
            pattern,
            f"is {kind}: it needs all features of its input, and {word} leaves it a part of its weight",
            line(pattern, "replicate"),
            cause,
        )
    return None


def _is_norm(module: nn.Module) -> bool:
    """Whether all that a module holds are vectors."""
    return not is_linear(module) and all(p.ndim <= 1 for p in module.parameters(recurse=False))
