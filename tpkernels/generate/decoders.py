"""The forward passes of generation: all tokens of a prompt at once, then one token of every sequence at a time.

Two caches of keys and values, both cut by heads, since each rank's attention makes those of its own heads alone:

    DynamicDecoder   grows by a token each step; prompts of a batch are padded on the left
    SlotDecoder      memory of a fixed size, a slot for each sequence, each at a position of its own: sequences begin
                     and end between steps, and a step can be compiled
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .ropes import Ropes
from .stack import MOST_ROWS, Stack

MOST_TOGETHER = 64  # tokens of a prompt that is computed beside others; longer ones are for a real GEMM
GRAIN = 64  # tokens; the sizes of caches and the spans of steps are multiples: few sizes to compile, aligned rows


def rounded_up(tokens: int) -> int:
    """The least multiple of GRAIN that is not less."""
    return -(-tokens // GRAIN) * GRAIN


class _Decoder:
    """A decoder of transformers, and its prefill."""

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(Any, model)
        takes = inspect.signature(model.forward).parameters
        if "past_key_values" not in takes or "position_ids" not in takes or self.model.config.is_encoder_decoder:
            raise ValueError(
                f"generate: the model must be a decoder with past_key_values and position_ids, "
                f"got {type(model).__name__}"
            )
        self._ropes = Ropes(model)
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.vocab_size: int = self.model.config.get_text_config(decoder=True).vocab_size

    def _forward(
        self,
        ids: Tensor | None,
        mask: Tensor | None,
        positions: Tensor,
        cache: Cache,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """The logits [B, V] after the last tokens, which are given as ids or as their embeddings."""
        given = {"input_ids": ids} if embedded is None else {"inputs_embeds": embedded}
        found = self.model(
            **given,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._last,
        )
        logits: Tensor = found.logits[:, -1]
        return logits

    def _prefill(self, prompts: Sequence[Sequence[int]], cache: Cache) -> tuple[Tensor, Tensor | None]:
        """The logits [B, V] after the prompts, and the mask [B, T] of their tokens; None where all have T tokens."""
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        if all(len(prompt) == longest for prompt in prompts):
            positions = torch.arange(longest).expand(len(prompts), -1)
            with self._ropes.by_row():
                return self._forward(ids, None, positions, cache), None
        own = sorted({type(layer).__name__ for layer in cache.layers if type(layer).__module__ != Cache.__module__})
        if own:  # no mask keeps padding out of the windows that they make of neighbouring tokens
            lengths_of = sorted({len(prompt) for prompt in prompts})
            raise ValueError(f"generate: with a cache of {', '.join(own)} prompts need one length, got {lengths_of}")
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        positions = torch.arange(longest) - (longest - lengths)
        mask = (positions >= 0).long()
        with self._ropes.by_row():
            return self._forward(ids, mask, positions.clamp(min=0), cache), mask


class DynamicDecoder(_Decoder):
    """Generation of one batch with caches that grow: by a token, or as slots where a step is one call (stack.py)."""

    _slots: SlotDecoder | None = None

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Begin with prompts of one token or more each; the logits [B, V] after them."""
        if _stack_of(self.model) is not None and _grows_alone(self.model.config):
            length = rounded_up(max(len(prompt) for prompt in prompts) + 1)
            self._slots = SlotDecoder(self.model, len(prompts), length)
            return self._slots.start(prompts)
        self._slots = None
        self._cache = self._new_cache()
        self._lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        self._tokens = [list(prompt) for prompt in prompts]
        logits, self._mask = self._prefill(prompts, self._cache)
        return logits

    @torch.inference_mode()
    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Append tokens to the sequences named (something to the others); the logits [B, V] after them."""
        if self._slots is not None:
            self._slots.make_room()
            return self._slots.step({row: tokens.get(row, 0) for row in range(self._slots.slots)})
        for row, so_far in enumerate(self._tokens):
            so_far.append(tokens.get(row, 0))
        self._lengths += 1
        if any(len(so_far) - 1 == self._ropes.switch for so_far in self._tokens):
            self._cache = self._new_cache()
            logits, self._mask = self._prefill(self._tokens, self._cache)
            return logits
        ids = torch.tensor([so_far[-1:] for so_far in self._tokens])
        if self._mask is not None:
            self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        with self._ropes.by_row():
            return self._forward(ids, self._mask, self._lengths - 1, self._cache)

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, heads of this rank, max_length, head_dim]."""

    is_compileable = True
    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, slots: _Slots) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate every slot, in the dtype and for the heads of the states of a forward."""
        for name, states in (("keys", key_states), ("values", value_states)):
            _, heads, _, dim = states.shape
            setattr(self, name, states.new_zeros(self._slots.count, heads, self._slots.max_length, dim))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of each row at its position; the keys and values of the rows' slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        positions, slots, span = self._slots.positions, self._slots.row_slots, self._slots.span
        rows = positions.shape[0]
        index = torch.arange(rows) if slots is None else slots
        self.keys[index, :, positions] = key_states[:, :, 0]
        self.values[index, :, positions] = value_states[:, :, 0]
        if slots is not None:
            return self.keys[slots, :, :span], self.values[slots, :, :span]
        return self.keys[:rows, :, :span], self.values[:rows, :, :span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of keys."""
        return self._slots.span, 0

    def get_seq_length(self) -> int:
        """Length of the longest sequence; positions are given with each call, so nothing depends on it."""
        return self._slots.max_length

    def get_max_length(self) -> int:
        """Tokens that a slot can hold."""
        return self._slots.max_length


class _Slots(Cache):
    """The memory of all slots.

    Attributes:
        positions: [rows], of the next tokens.
        row_slots: [rows], their slots; None: the first ones.
        span: the most tokens that a token attends to.
    """

    def __init__(self, layers: int, count: int, max_length: int) -> None:
        self.count, self.max_length, self.span = count, max_length, max_length
        self.positions = torch.zeros(1, dtype=torch.long)
        self.row_slots: Tensor | None = None
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])

    def grow(self, max_length: int) -> None:
        """Make every slot longer, with the keys and values that it has."""
        before, self.max_length = self.max_length, max_length
        for layer in cast(Any, self.layers):
            old = (layer.keys, layer.values)
            layer.lazy_initialization(*old)
            for states, grown in zip(old, (layer.keys, layer.values), strict=True):
                grown[:, :, :before] = states

    def fill(self, slot: int, source: Cache, row: int, length: int) -> None:
        """Copy keys and values of one sequence from another cache.

        Args:
            slot: to which.
            source, row: from which cache, and from which of its rows.
            length: how many tokens, the last ones.
        """
        pairs: Any = zip(self.layers, source.layers, strict=True)
        for mine, theirs in pairs:
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)
            start = theirs.keys.shape[2] - length
            mine.keys[slot, :, :length] = theirs.keys[row, :, start:]
            mine.values[slot, :, :length] = theirs.values[row, :, start:]


class SlotDecoder(_Decoder):
    """Generation in slots of a fixed size; sequences begin and end between steps.

    Args:
        model: full attention in every layer, or windows that are longer than max_length.
        slots: sequences at a time.
        max_length: tokens of a sequence, its prompt among them.
        compile: compile the step, once for each number of rows. Steps that are one call anyway (stack.py) are not.
    """

    def __init__(self, model: nn.Module, slots: int, max_length: int, *, compile: bool = False) -> None:
        super().__init__(model)
        layers = DynamicCache(config=self.model.config).layers
        if not all(_is_whole(layer, max_length) for layer in layers):
            kinds = sorted({type(layer).__name__ for layer in layers})
            raise ValueError(
                f"generate: a static cache needs full attention in every layer, got {', '.join(kinds)} with "
                f"max_length {max_length}; take the dynamic cache"
            )
        self.slots, self.max_length = slots, max_length
        self._cache = _Slots(len(layers), slots, max_length)
        self._lengths = [0] * slots
        self._tokens = [list[int]() for _ in range(slots)]  # kept where the ropes switch
        self._bool_mask = self.model.config._attn_implementation == "sdpa"
        self._compiled = compile
        self._stack = _stack_of(model)
        self._step: Any = self._slot_step
        if compile:
            from .compiled import compiled  # which imports torch's compiler, a second of the start of every rank

            self._step = compiled(self._slot_step)

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Fill the first slots with a batch of prompts of one token or more each; the logits [B, V] after them."""
        cache = DynamicCache()
        logits, _ = self._prefill(prompts, cache)
        for slot, prompt in enumerate(prompts):
            self._take(slot, cache, slot, prompt)
        return logits

    @torch.inference_mode()
    def insert(self, slot: int, prompt: Sequence[int]) -> Tensor:
        """Begin one sequence of one token or more in a slot; the logits [V] after it."""
        cache = DynamicCache()
        logits, _ = self._prefill([prompt], cache)
        self._take(slot, cache, 0, prompt)
        return logits[0]

    @property
    def fills_together(self) -> bool:
        """Whether `fill` computes tokens of several prompts in one pass."""
        return self._stack is not None and not self._ropes.scale_by_length  # which takes whole prompts

    @torch.inference_mode()
    def fill(self, prompts: Mapping[int, Sequence[int]], *, together: bool) -> dict[int, Tensor]:
        """Begin sequences of one token or more: {slot: prompt}; {slot: the logits [V] after it}.

        Args:
            prompts: those of more than MOST_TOGETHER tokens run by themselves.
            together: compute the tokens of the others in common passes, the same on all ranks. One call of C++ makes a
                pass (stack.py), and a prompt has the same bits whatever prompts are beside it.
        """
        packed = {slot: p for slot, p in prompts.items() if together and len(p) <= MOST_TOGETHER}
        logits = {slot: self.insert(slot, prompt) for slot, prompt in prompts.items() if slot not in packed}
        tokens = [(slot, at, token) for slot, prompt in packed.items() for at, token in enumerate(prompt)]
        for begin in range(0, len(tokens), MOST_ROWS):
            logits |= self._pass(tokens[begin : begin + MOST_ROWS], {slot: len(p) for slot, p in packed.items()})
        return logits

    def _pass(self, tokens: Sequence[tuple[int, int, int]], lengths: Mapping[int, int]) -> dict[int, Tensor]:
        """Append tokens (slot, position, token); the logits [V] after each sequence whose last token is among them."""
        slots, positions, ids = torch.tensor(tokens).T.contiguous()
        last = {slot: row for row, (slot, at, _) in enumerate(tokens) if at + 1 == lengths[slot]}
        for slot in dict.fromkeys(slots.tolist()):
            if lengths[slot] >= self.max_length:
                self._refuse(lengths[slot])
            self._lengths[slot] = lengths[slot]
        hidden = self._hidden(ids[:, None], slots, positions)
        if not last:
            return {}
        logits = self.model.lm_head(hidden[list(last.values())])[:, -1]
        return dict(zip(last, logits, strict=True))

    def _hidden(self, ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        decoder = self.model.model
        embedded = decoder.embed_tokens(ids)
        hidden: Tensor | None = None
        if self._stack is not None and self._stack.takes(ids):
            hidden = self._stack.run(embedded, slots, positions, self._cache)
        if hidden is None:  # the same calls of collectives
            span, self._cache.span = self._cache.span, min(self.max_length, rounded_up(int(positions.max()) + 1))
            self._cache.row_slots, self._cache.positions = slots, positions
            hidden = decoder(
                inputs_embeds=embedded,
                attention_mask=self._mask(positions),
                position_ids=positions[:, None],
                past_key_values=self._cache,
                use_cache=True,
            )[0]
            self._cache.row_slots, self._cache.span = None, span
        return hidden

    @torch.inference_mode()
    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Append a token to the sequence of every slot named; the logits [rows, V], a row for each slot.

        Slots that are not named are free from then on, so that all ranks agree on them without another message.
        There are as many rows as the highest slot needs, rounded up to a power of two, to limit the number of sizes.
        """
        rows = min(self.slots, 1 << max(tokens).bit_length())
        ids = torch.zeros(rows, 1, dtype=torch.long)
        for slot, token in tokens.items():
            ids[slot, 0] = token
        self._lengths = [length if slot in tokens else 0 for slot, length in enumerate(self._lengths)]
        if not self._compiled:  # for which it must not change
            self._cache.span = min(self.max_length, rounded_up(max(self._lengths) + 1))
        self._cache.positions = torch.tensor(self._lengths[:rows])
        with self._ropes.by_row():
            logits = self._logits(ids, self._cache.positions)
        for slot in sorted(tokens):
            self._lengths[slot] += 1
            if self._ropes.switch is not None:
                self._tokens[slot].append(tokens[slot])
            if self._lengths[slot] - 1 == self._ropes.switch:
                cache = DynamicCache()
                logits[slot] = self._prefill([self._tokens[slot]], cache)[0]
                self._cache.fill(slot, cache, 0, self._lengths[slot])
        return logits

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor
        if self._stack is None or not self._stack.takes(ids):
            logits = self._step(ids, positions, self._cache)
            return logits
        embedded = self.model.model.embed_tokens(ids)
        hidden = self._stack.run(embedded, torch.arange(len(positions)), positions, self._cache)
        if hidden is None:  # the embedding is a collective, which is not repeated
            return self._slot_step(None, positions, self._cache, embedded)
        logits = self.model.lm_head(hidden)[:, -1]
        return logits

    def make_room(self) -> None:
        """Make the slots longer where the longest sequence fills its own."""
        if max(self._lengths) == self.max_length:
            self.max_length *= 2
            self._cache.grow(self.max_length)

    def _take(self, slot: int, cache: Cache, row: int, prompt: Sequence[int]) -> None:
        length = len(prompt)
        if length >= self.max_length:
            self._refuse(length)
        self._cache.fill(slot, cache, row, length)
        self._lengths[slot], self._tokens[slot] = length, list(prompt)

    def _refuse(self, length: int) -> NoReturn:
        raise ValueError(f"generate: a prompt must be shorter than max_length {self.max_length}, got {length} tokens")

    def _slot_step(self, ids: Tensor | None, positions: Tensor, cache: Cache, embedded: Tensor | None = None) -> Tensor:
        return self._forward(ids, self._mask(positions), positions[:, None], cache, embedded)

    def _mask(self, positions: Tensor) -> Tensor:
        mask = (torch.arange(self._cache.span) <= positions[:, None])[:, None, None]
        if not self._bool_mask:
            dtype = self.model.dtype
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        return mask


def _stack_of(model: nn.Module) -> Stack | None:
    try:
        return Stack(model)
    except ValueError:
        return None


def _grows_alone(config: Any) -> bool:
    """Whether all that a cache of the model does is to grow."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def _is_whole(layer: Any, max_length: int) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return bool(layer.sliding_window >= max_length)
    return type(layer) is DynamicLayer
