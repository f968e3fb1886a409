"""The tables of words and the heads that make logits of them, cut along the vocabulary."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor, nn


def vocabulary_styles(model: nn.Module, sources: dict[str, nn.Module], taken: set[str]) -> dict[str, str]:
    """Cut the tables of words along the words, and with them the layers that make logits of as many."""
    tables = [t for t in _word_tables(model, sources) if isinstance(t, nn.Embedding)]
    tables = [t for t in tables if t.max_norm is None and not t.sparse and not t.scale_grad_by_freq]
    styles: dict[str, str] = {}
    for table in tables:
        tied = {n: m for n, m in sources.items() if getattr(m, "weight", None) is table.weight}
        heads = {
            n: m
            for n, m in sources.items()
            if isinstance(m, nn.Linear)
            and m.out_features == table.num_embeddings
            and n not in tied
            and _is_head(model, m)
        }
        if not any(n in taken for n in tied) and _all_held(model, table.weight, tied):
            styles |= {n: "vocab" if isinstance(m, nn.Embedding) else "vocab_head" for n, m in tied.items()}
            styles |= {n: "vocab_head" for n in heads if n not in taken}
    return styles


def _word_tables(model: nn.Module, sources: dict[str, nn.Module]) -> list[nn.Module]:
    """The input embeddings that models of transformers name; of other models the embedding with the most rows."""
    found: list[nn.Module | None] = []
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            found.append(module_of(module, "get_input_embeddings"))
    tables = [m for m in sources.values() if isinstance(m, nn.Embedding)]
    if not hasattr(model, "get_input_embeddings") and tables:
        found.append(max(tables, key=lambda m: m.num_embeddings))
    return list(dict.fromkeys(module for module in found if module is not None))


def module_of(model: nn.Module, getter: str) -> nn.Module | None:
    """Return the module that a method of a model of transformers names.

    Args:
        model: any.
        getter: such as "get_input_embeddings".

    Returns:
        None where the model has no such method, or its class does not say which module it is.
    """
    with suppress(NotImplementedError, AttributeError):
        found: nn.Module | None = getattr(model, getter, lambda: None)()
        return found
    return None


def _is_head(model: nn.Module, module: nn.Module) -> bool:
    return not hasattr(model, "get_output_embeddings") or module_of(model, "get_output_embeddings") is module


def _all_held(model: nn.Module, weight: Tensor, tied: dict[str, nn.Module]) -> bool:
    """Whether the modules `tied` are all that hold this parameter."""
    holders = {n for n, m in model.named_modules() if any(p is weight for p in m.parameters(recurse=False))}
    return holders <= set(tied)
