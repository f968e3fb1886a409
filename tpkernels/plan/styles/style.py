"""The styles of a plan: how one module is cut. A plan is data, {module glob: style}.

    column                 a linear cut along its outputs: each rank computes its own (heads, hidden units)
    column_gather          the same, and the outputs are gathered: what follows sees them all
    packed_column:3        a fused linear of 3 projections of equal size, each cut by itself
    packed_column:64,16,16 the same with the sizes of the projections
    packed_column:qkv      the same with the sizes that the attention block's heads say
    row                    a linear cut along its inputs, which a column layer leaves cut; the products are summed
    row_split              the same for inputs that every rank has whole: the layer takes its part
    multihead_attention    an nn.MultiheadAttention cut by heads, with its out_proj
    vocab                  an embedding cut along its rows
    vocab_head             the layer that makes logits, cut along the vocabulary; the logits are gathered
    expert                 a mixture's experts over the ranks, whole experts each; the router stays whole
    sum_grad               a small module inside a cut block (a norm of each head): parameters whole, gradients summed
    sum_tail:64            a whole linear whose last 64 outputs go straight into cut heads: their gradient is summed
    replicate              whole on every rank
    common                 an nn.Dropout inside a cut block whose input is whole: all ranks draw one mask
    counts:n_heads,width   a module whose numbers of these names count what is cut: each rank's become its own part
    STYLE:units=8          column, packed_column, row and counts: cut into 8 units, the same of all linears of a block,
                           where no module says how many heads there are; an nn.Embedding takes "column", too (columns)

nn.Linear, [N, K] weights, and the Conv1D of GPT-2, [K, N], take the same styles. In an attention block, a module that
knows the size or number of its heads, column and row layers are cut by whole groups of heads that share a key.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpkernels.errors import PlanError

LINEAR = ("column", "column_gather", "packed_column", "row", "row_split", "vocab_head")
STYLES = (*LINEAR, "multihead_attention", "vocab", "expert", "sum_grad", "sum_tail", "counts", "common", "replicate")
IN_UNITS = ("column", "packed_column", "row", "counts")

# What transformers calls them in `base_model_tp_plan` and `_tp_plan`. None: the rule says nothing for us, because it
# stands for parameters inside a module that has a rule of its own.
TRANSLATION: dict[str, str | None] = {
    "colwise": "column",
    "rowwise": "row",
    "colwise_gather_output": "column_gather",
    "colwise_rep": "column_gather",
    "rowwise_split_input": "row_split",
    "rowwise_rep": "row_split",
    "embedding_rowwise": "vocab",
    "packed_colwise": "packed_column:2",
    "replicated_with_grad_allreduce": "sum_grad",
    "moe_tp_experts": "expert",
    "sequence_parallel": "replicate",  # which norms see a part of the tokens follows from the layers
    "replicate": "replicate",
    "all_reduce": None,
    "packed_rowwise": None,
    "grouped_gemm": None,
    "local_params": None,
}


@dataclass(frozen=True)
class Style:
    """A style taken apart.

    Attributes:
        name: one of STYLES.
        packed: of packed_column, the number of projections (one number), their sizes, or () for "qkv"; of sum_tail, how
            many outputs.
        units: into how many units it is cut; 0: single features, or what the attention block says.
        counts: of counts, the names of the numbers.
    """

    name: str
    packed: tuple[int, ...] = ()
    units: int = 0
    counts: tuple[str, ...] = ()


def parse_style(text: str) -> Style:
    """Take a style apart.

    Raises:
        PlanError: there is no such style.
    """
    text, _, units = text.partition(":units=")
    name, _, rest = text.partition(":")
    if name not in STYLES:
        raise PlanError(f"Plan: styles [{text!r}] do not exist; the styles are {list(STYLES)}")
    if units and (name not in IN_UNITS or not units.isdigit() or int(units) < 1):
        raise PlanError(f"Plan: styles {list(IN_UNITS)} take :units=<a number>, got {text!r} with {units!r}")
    if name == "counts":
        if not rest or not units:
            raise PlanError(f"Plan: style 'counts' needs names and units, such as counts:n_heads:units=8, got {text!r}")
        return Style(name, units=int(units), counts=tuple(n.strip() for n in rest.split(",")))
    if name == "sum_tail":
        if not (rest.isdigit() and int(rest) > 0):
            raise PlanError(f"Plan: style 'sum_tail' needs a number of outputs behind a colon, got {text!r}")
        return Style(name, (int(rest),))
    if name != "packed_column":
        if rest:
            raise PlanError(f"Plan: style {name!r} takes nothing behind a colon, got {text!r}")
        return Style(name, units=int(units or 0))
    if rest == "qkv":
        return Style(name, units=int(units or 0))
    numbers = rest.split(",")
    if not all(n.strip().isdigit() and int(n) > 0 for n in numbers):
        raise PlanError(
            f"Plan: style 'packed_column' needs the number of projections, their sizes or qkv behind a colon, such as "
            f"packed_column:3 or packed_column:64,16,16, got {text!r}"
        )
    return Style(name, tuple(int(n) for n in numbers), int(units or 0))


def packed_sizes(style: Style, full_size: int, module: str) -> list[int]:
    """Return the sizes of the projections in a fused layer of full_size outputs.

    Raises:
        PlanError: they do not add up.
    """
    sizes = list(style.packed)
    if len(sizes) == 1:
        count = sizes[0]
        sizes = [full_size // count] * count
    if sum(sizes) != full_size:
        raise PlanError(f"Plan: the projections of {module} must add up to its {full_size} outputs, got {sizes}")
    return sizes
