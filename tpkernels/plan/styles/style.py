"""The table of styles. A plan is data, {module glob: style}.

    column                 a linear sharded along its outputs: each rank computes its own (heads, hidden units)
    column_gather          the same, and the outputs are gathered: what follows sees them all
    packed_column:3        a fused linear of 3 projections of equal size, each sharded by itself
    packed_column:64,16,16 the same with the sizes of the projections
    packed_column:qkv      the same with the sizes that follow from the heads of the attention block
    row                    a linear sharded along its inputs, which a column layer leaves sharded; products are summed
    row_split              the same for replicated inputs: the layer takes its shard
    multihead_attention    an nn.MultiheadAttention sharded by heads, with its out_proj
    vocab                  an embedding sharded along its rows
    vocab_head             the linear that computes logits, sharded along the vocabulary; the logits are gathered
    expert                 a mixture's experts over the ranks, each on one rank; the router is replicated
    sum_grad               a small module inside a sharded block (a norm of each head): parameters replicated, gradients
                           summed
    sum_tail:64            a replicated linear whose last 64 outputs go straight into sharded heads: their gradient is
                           summed
    replicate              replicated on every rank
    common                 an nn.Dropout inside a sharded block whose input is replicated: all ranks draw one mask
    counts:n_heads,width   a module whose attributes of these names count sharded features: each rank has its own counts
    STYLE:units=8          column, packed_column, row and counts: of 8 units, the same for all linears of a block, where
                           no module has the number of heads; an nn.Embedding takes "column", too (columns)

nn.Linear, [N, K] weights, and the Conv1D of GPT-2, [K, N], take the same styles. In an attention block, a module with
the size or number of its heads, column and row layers are sharded by whole groups of heads that share a key.
"""

from __future__ import annotations

from tpkernels.errors import PlanError
from tpkernels.plan.styles.attention import MultiheadAttentionStyle
from tpkernels.plan.styles.base import Style
from tpkernels.plan.styles.experts import ExpertStyle
from tpkernels.plan.styles.linear import (
    ColumnGatherStyle,
    ColumnStyle,
    PackedColumnStyle,
    RowSplitStyle,
    RowStyle,
    VocabHeadStyle,
)
from tpkernels.plan.styles.replicated import CommonStyle, CountsStyle, ReplicateStyle, SumGradStyle, SumTailStyle
from tpkernels.plan.styles.vocabulary import VocabStyle

STYLES: dict[str, type[Style]] = {
    style.name: style
    for style in (
        ColumnStyle,
        ColumnGatherStyle,
        PackedColumnStyle,
        RowStyle,
        RowSplitStyle,
        VocabHeadStyle,
        MultiheadAttentionStyle,
        VocabStyle,
        ExpertStyle,
        SumGradStyle,
        SumTailStyle,
        CountsStyle,
        CommonStyle,
        ReplicateStyle,
    )
}

# The names of transformers in `base_model_tp_plan` and `_tp_plan`. None: the rule is ignored, because it is about
# parameters inside a module that has a rule of its own.
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
    "sequence_parallel": "replicate",  # which norms see this rank's tokens follows from the layers
    "replicate": "replicate",
    "all_reduce": None,
    "packed_rowwise": None,
    "grouped_gemm": None,
    "local_params": None,
}


def parse_style(text: str) -> Style:
    """Parse a style of a plan, `name`, `name:argument` or `name:argument:units=N`.

    Raises:
        PlanError: there is no such style, or it takes no such argument.
    """
    text, _, units = text.partition(":units=")
    name, _, argument = text.partition(":")
    if name not in STYLES:
        raise PlanError(f"Plan: styles [{text!r}] do not exist; the styles are {list(STYLES)}")
    if units and (not STYLES[name].takes_units or not units.isdigit() or int(units) < 1):
        allowed = [name for name, style in STYLES.items() if style.takes_units]
        raise PlanError(f"Plan: styles {allowed} take :units=<a number>, got {text!r} with {units!r}")
    return STYLES[name].parse(argument, int(units or 0))
