"""A byte-level GPT whose every matrix is cut over the ranks of a group; also an example of a model built by hand.

    x = embedding(bytes)                          # table cut over the vocabulary
    for each block:
        x = x + proj(attention(qkv(norm(x))))     # qkv cut by whole heads (column), proj takes the heads back (row)
        x = x + down(gelu(up(norm(x))))           # up cut by columns, down by rows
    loss = cross_entropy(head(norm(x)))           # logits stay cut over the vocabulary

One block has two collectives forward (proj, down) and two backward (qkv, up). Activations are [tokens, d_model] with
tokens = batch * length, so that sequence parallel cuts dimension 0, evenly or not.

The blocks are made of `Parts`, the five things that differ between a cut and an uncut model: `sharded_parts` are the
layers of this library, `whole_parts` are torch's own, and bench/ has parts on plain collectives. All give the same
parameters for the same seed, so that one model file serves training, the check against one process, and the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpkernels import layers, ops
from tpkernels.comm.group import Group, resolve
from tpkernels.pipeline import Flights


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model. `heads` need not divide by the number of ranks: the first ranks take one head more."""

    layers: int = 4
    d_model: int = 256
    heads: int = 4
    context: int = 128
    vocab: int = 256

    @property
    def head_dim(self) -> int:
        """Values in a head."""
        return self.d_model // self.heads


class MakeLinear(Protocol):
    """Builds a linear layer; its cut dimension is cut in whole items of `unit` features."""

    def __call__(self, in_features: int, out_features: int, bias: bool = True, *, unit: int = 1) -> nn.Module:
        """The layer, for x [tokens, in_features (of this rank)]."""


@dataclass(frozen=True)
class Parts:
    """The layers and functions that a GPT is built from.

    `loss` maps (logits, target, size of the vocabulary) to the loss per token; `gather_logits` maps (logits, size of
    the vocabulary) to uncut logits.
    """

    embedding: Callable[[int, int], nn.Module]
    column: MakeLinear
    row: MakeLinear
    norm: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor, int], Tensor]
    gather_logits: Callable[[Tensor, int], Tensor]


def whole_parts() -> Parts:
    """Torch's own layers, unsharded: the reference of all other parts."""

    def linear(in_features: int, out_features: int, bias: bool = True, *, unit: int = 1) -> nn.Module:
        del unit  # nothing is cut
        return nn.Linear(in_features, out_features, bias)

    return Parts(
        embedding=nn.Embedding,
        column=linear,
        row=linear,
        norm=nn.LayerNorm,
        loss=whole_loss,
        gather_logits=lambda logits, vocab: logits,
    )


def whole_loss(logits: Tensor, target: Tensor, vocab: int) -> Tensor:
    """Cross entropy of each token, in fp32 or better whatever the logits are."""
    del vocab  # the logits have it all
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, reduction="none")


def sharded_parts(
    group: Group | None = None,
    *,
    sequence_parallel: bool = False,
    codec: str = "none",
    grad_codec: str | None = None,
) -> Parts:
    """The parallel layers of this library over `group` (None: all ranks).

    Args:
        sequence_parallel: keep activations between the linear layers cut over the tokens (less memory, same traffic).
        codec: packs the partial sums of the linear layers; those of embedding and loss are not packed.
        grad_codec: packs those of the backward; None: as `codec`.
    """
    group = resolve(group)
    cut: dict[str, Any] = {"group": group, "sequence_parallel": sequence_parallel}
    packed: dict[str, Any] = {"codec": codec, "grad_codec": grad_codec, **cut}

    def loss(logits_shard: Tensor, target: Tensor, vocab: int) -> Tensor:
        return ops.vocab_cross_entropy(logits_shard, target, group=group, vocab_size=vocab)

    def gather_logits(logits_shard: Tensor, vocab: int) -> Tensor:
        return ops.all_gather(logits_shard, dim=1, group=group, dim_size=vocab)

    return Parts(
        embedding=partial(layers.VocabParallelEmbedding, **cut),
        column=partial(layers.ColumnParallelLinear, **packed),
        row=partial(layers.RowParallelLinear, **packed),
        norm=partial(layers.LayerNorm, **cut),
        loss=loss,
        gather_logits=gather_logits,
    )


class Block(nn.Module):
    """Attention, then MLP, each behind a norm and added to the stream of activations."""

    def __init__(self, config: GPTConfig, parts: Parts) -> None:
        super().__init__()
        d = config.d_model
        self.head_dim = config.head_dim
        self.norm_attention = parts.norm(d)
        # Rows head by head, (q, k, v) of head 0 first: any cut between heads gives a rank whole heads.
        self.qkv = parts.column(d, 3 * d, unit=3 * self.head_dim)
        self.proj = parts.row(d, d, unit=self.head_dim)
        self.norm_mlp = parts.norm(d)
        self.up = parts.column(d, 4 * d)
        self.down = parts.row(4 * d, d)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """x: [tokens (of this rank, if sequence parallel), d_model]; rotation: see `rotation_table`."""
        x = x + self.proj(self.attend(self.qkv(self.norm_attention(x)), rotation))
        return cast(Tensor, x + self.down(F.gelu(self.up(self.norm_mlp(x)))))

    def attend(self, qkv: Tensor, rotation: Tensor) -> Tensor:
        """Causal attention in each sequence, each of this rank's h heads: [tokens, 3 * h * head_dim] -> [tokens, .]."""
        length = rotation.shape[-2]
        parts = qkv.view(-1, length, qkv.shape[-1] // (3 * self.head_dim), 3, self.head_dim).permute(3, 0, 2, 1, 4)
        q, k = rotate(parts[:2], rotation)
        y = F.scaled_dot_product_attention(q, k, parts[2], is_causal=True)
        return y.transpose(1, 2).reshape(qkv.shape[0], qkv.shape[-1] // 3)


class GPT(nn.Module):
    """The model. `forward` gives logits (this rank's part of the vocabulary), `loss` the loss of each token."""

    def __init__(self, config: GPTConfig, parts: Parts) -> None:
        super().__init__()
        self.config, self.parts = config, parts
        self.embedding = parts.embedding(config.vocab, config.d_model)
        self.blocks = nn.ModuleList(Block(config, parts) for _ in range(config.layers))
        self.norm = parts.norm(config.d_model)
        self.head = parts.column(config.d_model, config.vocab, bias=False)
        self.register_buffer("rotation", rotation_table(config.context, config.head_dim), persistent=False)
        self.scale_initial_weights()

    @torch.no_grad()
    def scale_initial_weights(self) -> None:
        """Scale in place what the layers drew: no factor depends on the shard, so the start is equal for every cut."""
        cast(Tensor, self.embedding.weight).mul_(0.5)
        cast(Tensor, self.head.weight).mul_(0.5)
        for block in cast("list[Block]", self.blocks):
            for layer in (block.proj, block.down):  # keeps the variance of the stream from growing with depth
                cast(Tensor, layer.weight).mul_((2 * self.config.layers) ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, length], the same on all ranks -> logits [batch * length, vocab / R]."""
        x = self.embedding(ids.flatten())
        rotation = cast(Tensor, self.rotation)[:, : ids.shape[1]]
        for block in self.blocks:
            x = block(x, rotation)
        return cast(Tensor, self.head(self.norm(x)))

    def loss(self, ids: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy in nats per byte, the same on all ranks."""
        return self.parts.loss(self(ids), target.flatten(), self.config.vocab).mean()


def rotation_table(context: int, head_dim: int) -> Tensor:
    """Cosine and sine of position * frequency, [2, context, head_dim / 2] (Su et al. 2021, arXiv:2104.09864)."""
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(context, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin())).to(torch.get_default_dtype())


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + head_dim / 2]) by the angle of its position; x: [..., length, head_dim]."""
    cosine, sine = rotation.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[bytes],
    length: int,
    *,
    seed: int = 0,
    temperature: float = 0.8,
    pipeline: Group | None = None,
) -> list[bytes]:
    """Continue prompts. Collective: every rank draws from the same gathered logits with the same seed.

    The window is computed anew for each byte: enough for a short sample, wasteful for serving. It is padded to the full
    context, which changes no logits before the padding: oneDNN's kernels for products of 128 sizes would take 230 MiB.

    Args:
        model: on all ranks that it is sharded over.
        prompts: one byte or more each.
        length: bytes to draw.
        seed: of the draws of each prompt.
        temperature: logits are divided by it.
        pipeline: the ranks of the stages, where the model has been split by layer: as many prompts as stages keep all
            of them busy.

    Returns:
        each prompt and `length` more bytes.
    """
    stages = None if pipeline is None else cast(Any, model).tpk_stages
    flights = Flights(stages, pipeline, len(prompts))
    texts = [_Text(model, prompt, seed, temperature) for prompt in prompts]
    for step in range(length + 1):
        for i, text in enumerate(texts):
            if step > 0:
                text.ids = torch.cat((text.ids, flights.receive_tokens(i, 1)))
            if step < length and (logits := flights.run(i, "a window", text.logits)) is not None:
                flights.send_tokens(i, text.draw(logits))
    flights.end()
    return [bytes(text.ids.tolist()) for text in texts]


class _Text:
    """A text in progress."""

    def __init__(self, model: GPT, prompt: bytes, seed: int, temperature: float) -> None:
        self._model, self._temperature = model, temperature
        self._random = torch.Generator().manual_seed(seed)
        self.ids = torch.tensor(list(prompt), dtype=torch.int64)

    def logits(self) -> Tensor:
        """Of its last window, [context, vocab / R]."""
        window = self.ids[-self._model.config.context :]
        return cast(Tensor, self._model(F.pad(window, (0, self._model.config.context - len(window)))[None]))

    def draw(self, logits: Tensor) -> Tensor:
        """The next byte, [1]; a collective over the ranks that have these logits."""
        config = self._model.config
        length = min(len(self.ids), config.context)
        last = self._model.parts.gather_logits(logits[length - 1 : length], config.vocab).flatten().double()
        return torch.multinomial(torch.softmax(last / self._temperature, 0), 1, generator=self._random)
