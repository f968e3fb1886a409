"""torch's own nn.MultiheadAttention, sharded by heads: the style "multihead_attention".

    query, key, value --(in_proj, this rank's heads)--> q, k, v --> softmax(q k^T + mask) v --(out_proj, a row)--> sum

Arguments and results of the module stay: full inputs, masks, outputs and attention weights, and num_heads and embed_dim
are the full numbers. Its parameters are this rank's shards: in_proj_weight and in_proj_bias, which hold query, key and
value one after the other, each sharded by heads; q_proj_weight, k_proj_weight and v_proj_weight; bias_k and bias_v; and
the columns of out_proj.weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpkernels import ops
from tpkernels.errors import PlanError
from tpkernels.layers import rank_rng, sum_gradient, take_shard
from tpkernels.layers.base import Cut, ParallelModule, gather
from tpkernels.layers.convert import Tied, convert
from tpkernels.layers.functions import local_linear
from tpkernels.layers.linear import RowParallelLinear
from tpkernels.ops.checks import is_recorded
from tpkernels.plan.styles.base import CutSettings, Style
from tpkernels.plan.styles.linear import RowStyle
from tpkernels.shard import packed_runs, part_size, part_start

PACKED = ("in_proj_weight", "in_proj_bias")
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
BIASES = ("bias_k", "bias_v")
WHERE = "nn.MultiheadAttention, cut by heads"


class ByHeads(ParallelModule):
    """An nn.MultiheadAttention that computes this rank's heads; the ranks' outputs are summed."""

    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_weight: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: RowParallelLinear
    grad_codec: str

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the results of nn.MultiheadAttention for the same arguments, on every rank.

        Args:
            query, key, value, key_padding_mask, attn_mask, average_attn_weights, is_causal: as for
                nn.MultiheadAttention, replicated.
            need_weights: True sends the weights, [N, L, S] or [N, num_heads, L, S] of them, to all ranks.

        Raises:
            ValueError: shapes do not fit; a nested tensor; is_causal without attn_mask.
            TypeError: a mask that is neither bool nor floating point.
        """
        N, L, S = self._sizes(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError(f"{WHERE}: is_causal needs attn_mask, got none")
        hint = is_causal and key_padding_mask is None and not need_weights  # then the kernel makes the mask itself
        mask = self._mask(query, (N, L, S), None if hint else attn_mask, key_padding_mask)
        q, k, v = (self._heads(x, query.dim()) for x in self._project(query, key, value))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, self._bias(b, N)], 2) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        rate = self.dropout if self.training else 0.0
        weights = None
        with self._own_numbers(rate):
            if need_weights:
                scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
                weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), rate, rate > 0)
                context = weights @ v
            else:
                context = F.scaled_dot_product_attention(q, k, v, mask, rate, hint)
        y: Tensor = self.out_proj(self._tokens(context, query.dim()))
        if weights is not None:
            weights = self._whole(weights, average_attn_weights)
            weights = weights if query.dim() == 3 else weights.squeeze(0)
        return y, weights

    # ---- inputs ----------------------------------------------------------------------------------------------------

    def _sizes(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int]:
        """Return N, L and S."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(f"{WHERE}: query, key and value must be padded tensors, got a nested one")
        shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        if query.dim() not in (2, 3) or {key.dim(), value.dim()} != {query.dim()}:
            raise ValueError(f"{WHERE}: query, key and value must all have 3 dims, or 2 without a batch, got {shapes}")
        widths = (self.embed_dim, self.kdim, self.vdim)
        tokens, batch = (1, 0) if self.batch_first else (0, 1)
        if query.dim() == 2:
            N, L, S = 1, query.size(0), key.size(0)
        else:
            N, L, S = query.size(batch), query.size(tokens), key.size(tokens)
        fits = key.shape[:-1] == value.shape[:-1] and (query.dim() == 2 or key.size(batch) == N)
        if not fits or tuple(x.size(-1) for x in (query, key, value)) != widths:
            raise ValueError(
                f"{WHERE}: query, key and value must have one batch size and {widths} features, key and value as many "
                f"tokens, got {shapes} with batch_first={self.batch_first}"
            )
        return N, L, S

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Return this rank's [..., heads * head_dim] of each; the gradient of each different input is summed once."""
        bias, weight = self.in_proj_bias, self.in_proj_weight
        if weight is not None and query is key and key is value:
            y = ops.replicated_gemm(query, weight, bias, group=self.group, codec=self.grad_codec)
            return y.chunk(3, -1)
        inputs = self._enter(query, key, value)
        if weight is None:
            weights: Sequence[Tensor] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif key is value:
            size = weight.size(0) // 3
            b_q, b_kv = (None, None) if bias is None else (bias[:size], bias[size:])
            kv = local_linear(inputs[1], weight[size:], b_kv, self.group)
            return local_linear(inputs[0], weight[:size], b_q, self.group), *kv.chunk(2, -1)
        else:
            weights = weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return [local_linear(x, w, b, self.group) for x, w, b in zip(inputs, weights, biases, strict=True)]

    def _enter(self, *inputs: Tensor) -> list[Tensor]:
        """Return the inputs with gradients that are summed over the ranks; the same tensor for the same one."""
        different = [x for i, x in enumerate(inputs) if not any(x is other for other in inputs[:i])]
        entered: list[tuple[Tensor, Tensor]] = []
        for dtype in dict.fromkeys(x.dtype for x in different):
            found = [x for x in different if x.dtype == dtype]
            summed = sum_gradient(*found, group=self.group, grad_codec=self.grad_codec)
            entered += zip(found, summed, strict=True)
        return [next(y for other, y in entered if other is x) for x in inputs]

    def _heads(self, x: Tensor, dims: int) -> Tensor:
        """Return [N, heads, tokens, head_dim] of a projection that lies as the inputs do."""
        x = x.unsqueeze(0) if dims == 2 else x if self.batch_first else x.transpose(0, 1)
        return x.reshape(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _tokens(self, context: Tensor, dims: int) -> Tensor:
        """The inverse of `_heads`."""
        x = context.permute(0, 2, 1, 3) if dims == 2 or self.batch_first else context.permute(2, 0, 1, 3)
        x = x.flatten(2)
        return x.squeeze(0) if dims == 2 else x

    def _bias(self, bias: Tensor, N: int) -> Tensor:
        """One more key, or value, of each head: [1, 1, heads * head_dim] -> [N, heads, 1, head_dim]."""
        return bias.view(1, 1, -1, self.head_dim).transpose(1, 2).expand(N, -1, -1, -1)

    # ---- masks and weights -----------------------------------------------------------------------------------------

    def _mask(
        self, query: Tensor, sizes: tuple[int, int, int], attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Return what is added to the scores of this rank's heads: None, or something that expands to their shape."""
        N, L, S = sizes
        found: list[Tensor] = []
        if attn_mask is not None:
            expected = [N * self.num_heads, L, S] if attn_mask.dim() == 3 else [L, S]
            mask = _additive("attn_mask", attn_mask, expected, query)
            by_head = mask.dim() == 3
            found.append(self._of_own_heads(mask.reshape(N, -1, L, S)) if by_head else self._summed(mask)[None, None])
        if key_padding_mask is not None:
            mask = _additive("key_padding_mask", key_padding_mask, [N, S] if query.dim() == 3 else [S], query)
            found.append(self._summed(mask).reshape(N, 1, 1, S))
        extra = (self.bias_k is not None) + self.add_zero_attn
        found = [F.pad(mask, (0, extra)) for mask in found] if extra else found
        return sum(found[1:], start=found[0]) if found else None

    def _summed(self, mask: Tensor) -> Tensor:
        """A mask that is learned meets other heads on each rank, so its gradient is summed."""
        return sum_gradient(mask, group=self.group, grad_codec=self.grad_codec)[0]

    def _of_own_heads(self, mask: Tensor) -> Tensor:
        """[N, num_heads, L, S] -> those of this rank's heads; the gradient is gathered."""
        rank, R = self._place
        if is_recorded(mask):
            return take_shard(mask, 1, group=self.group, grad_codec=self.grad_codec)
        return mask.narrow(1, part_start(self.num_heads, R, rank), part_size(self.num_heads, R, rank))

    def _whole(self, weights: Tensor, average: bool) -> Tensor:
        """[N, heads, L, S] of this rank -> [N, L, S], the mean over all heads, or all heads' [N, num_heads, L, S]."""
        if average:
            return ops.all_reduce(weights.sum(1) / self.num_heads, group=self.group)
        return gather(weights, 1, self.num_heads, self.group)

    def _own_numbers(self, rate: float) -> AbstractContextManager[object]:
        """Each rank draws its own masks of attention; after it the generators of all ranks are in one state again."""
        return rank_rng(self.group) if rate > 0 and self.group.world_size > 1 else nullcontext()

    def extra_repr(self) -> str:
        """Return the number of heads, and that of this rank."""
        rank, R = self._place
        mine = part_size(self.num_heads, R, rank)
        return f"{self.embed_dim}, num_heads={self.num_heads} (shard {mine}), rank={rank} of {R}"


def _additive(name: str, mask: Tensor, expected: list[int], query: Tensor) -> Tensor:
    """A mask as something to add: True becomes minus infinity."""
    if list(mask.shape) != expected:
        raise ValueError(f"{WHERE}: {name} must have shape {expected}, got {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf"))
    if not mask.is_floating_point():
        raise TypeError(f"{WHERE}: {name} must be bool or floating point, got {mask.dtype}")
    return mask


# ---- plans ---------------------------------------------------------------------------------------------------------


def why_whole(module: nn.Module, *, plain: bool = False) -> str:
    """Return why a module cannot be cut by heads, "" if it can.

    Args:
        module: any.
        plain: whether a forward around that of nn.MultiheadAttention counts as a reason.
    """
    if not isinstance(module, nn.MultiheadAttention):
        return f"it is a {type(module).__name__}, and no nn.MultiheadAttention"
    forward = type(module).forward
    if forward is not nn.MultiheadAttention.forward and (plain or "__class__" not in forward.__code__.co_freevars):
        return f"it is a {type(module).__name__} with a forward of its own"
    own = {name for name, p in module._parameters.items() if p is not None}
    out = type(module.out_proj)
    if own - {*PACKED[1:], *BIASES} not in ({PACKED[0]}, {*SEPARATE}) or out.forward is not nn.Linear.forward:
        return f"it has other parameters than nn.MultiheadAttention: {sorted(own)}, and a {out.__name__}"
    return ""


def cuts_of_attention(module: nn.MultiheadAttention, R: int) -> dict[str, Cut]:
    """Return how the parameters of a module are sharded by heads over R ranks: {name: Cut}."""
    E, unit = module.embed_dim, module.head_dim
    cuts = {name: Cut(0, 3 * E, 1, packed_runs([E] * 3, R, [unit] * 3)) for name in PACKED}
    cuts |= dict.fromkeys(SEPARATE, Cut(0, E, unit)) | dict.fromkeys(BIASES, Cut(2, E, unit))
    return {name: cut for name, cut in cuts.items() if module._parameters.get(name) is not None}


class MultiheadAttentionStyle(Style):
    """multihead_attention: an nn.MultiheadAttention sharded by heads, with its out_proj."""

    name: ClassVar[str] = "multihead_attention"
    covers_children: ClassVar[bool] = True

    def refine(self, name: str, modules: dict[str, nn.Module], styles: dict[str, Style]) -> None:
        """Check the module, and remove the rule of its out_proj.

        Raises:
            PlanError: it cannot be sharded by heads, or its out_proj has another rule than "row".
        """
        why = why_whole(modules[name])
        if why:
            raise PlanError(f"Plan: {name} cannot be cut as {self.name!r}: {why}; give it 'replicate'")
        own = styles.pop(f"{name}.out_proj", None)
        if own is not None and own != RowStyle():
            got = f"{own.name}:units={own.units}" if own.units else own.name
            raise PlanError(f"Plan: {name}.out_proj is sharded with its heads, as 'row'; got {got!r}")

    def cut(self, name: str, module: nn.Module, R: int) -> Cut | None:
        """Return the cut of the input projections."""
        return next(iter(cuts_of_attention(cast(nn.MultiheadAttention, module), R).values()))

    def parameter_cuts(self, module: nn.Module, cut: Cut | None, R: int) -> dict[str, Cut]:
        """Return the cuts of all but out_proj."""
        return cuts_of_attention(cast(nn.MultiheadAttention, module), R)

    def apply(self, module: nn.Module, cut: Cut | None, settings: CutSettings, tied: Tied) -> None:
        """Shard the module and its out_proj by heads."""
        attention, group = cast(nn.MultiheadAttention, module), settings.group
        cuts = cuts_of_attention(attention, group.world_size)
        convert(attention, ByHeads, cuts, group, tied, grad_codec=settings.grad_codec)
        RowStyle().apply(attention.out_proj, Cut(1, attention.embed_dim, attention.head_dim), settings, tied)


def disable_fast_paths(model: nn.Module) -> None:
    """Make torch's encoders call their modules: in inference they would pass the weights, which are sharded, to a
    kernel of their own, and padded tokens as nested tensors."""
    for module in model.modules():
        if not any(isinstance(child, ParallelModule) for child in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # which only that kernel is for
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
