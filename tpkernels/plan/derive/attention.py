"""nn.MultiheadAttention in derived plans: it takes and returns full features, and is sharded by heads or replicated."""

from __future__ import annotations

from torch import nn

from tpkernels.plan.styles.attention import why_whole


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of torch's own class whose forward is that of the class: {name: module}."""
    return {name: m for name, m in model.named_modules() if name and not why_whole(m, plain=True)}


def replicated_attention(
    attention: dict[str, nn.Module], owners: dict[str, list[str]], direct: dict[str, str], R: int
) -> dict[str, str]:
    """Return why some of these modules cannot be sharded: {name: reason}.

    Args:
        attention: as `find_attention` gives it.
        owners: {parameter: the modules that hold it}.
        direct: {module: why} of modules whose parameters are used outside of their own forward.
        R: the least number of ranks that the plan is for.
    """
    own = {*attention, *(f"{name}.out_proj" for name in attention)}
    found: dict[str, str] = {}
    for name, module in attention.items():
        both = (name, f"{name}.out_proj")
        mine = {p: held for p, held in owners.items() if any(holder in both for holder in held)}
        shared = [p for p, held in mine.items() if not own.issuperset(held)]
        if any(n in direct for n in both):
            found[name] = next(direct[n] for n in both if n in direct)
        elif shared:
            found[name] = f"{shared[0]} is also a parameter of others: {owners[shared[0]]}"
        elif int(module.num_heads) < R:  # type: ignore[arg-type]
            found[name] = "it has one head"
    return found
