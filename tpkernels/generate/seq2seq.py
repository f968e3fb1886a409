"""Generation with an encoder and a decoder (T5, BART, MarianMT): prompts are read once, texts have a start token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache


class Seq2SeqDecoder:
    """Generation of one batch, with caches that grow; attention to the encoder keeps its keys and values.

    Of the generation config it follows what says which tokens may come: the start token, forced_bos_token_id, single
    tokens of bad_words_ids, and suppress_tokens. Beams and penalties are not made.

    Raises:
        ValueError: the model is no encoder and decoder of texts, or does not say how a text begins.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(Any, model)
        takes = inspect.signature(model.forward).parameters
        wanted = {"input_ids", "decoder_input_ids", "encoder_outputs", "past_key_values"}
        if not wanted <= set(takes) or not self.model.can_generate():
            raise ValueError(
                f"generate: a model with an encoder must read and write texts (a head, and a forward with "
                f"{', '.join(sorted(wanted))}), got {type(model).__name__}"
            )
        start = self._option("decoder_start_token_id")
        start = self._option("bos_token_id") if start is None else start
        if start is None:
            raise ValueError("generate: neither config nor generation_config has decoder_start_token_id: set it")
        how = getattr(model, "generation_config", None)
        self.start_token, self._first = int(start), getattr(how, "forced_bos_token_id", None)
        single = [ids[0] for ids in getattr(how, "bad_words_ids", None) or () if len(ids) == 1]
        self._never = sorted({*single, *(getattr(how, "suppress_tokens", None) or ())})
        self._most = self._option("max_position_embeddings")

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts of one token or more each; the logits [B, V] of the first tokens of their texts."""
        longest = max(len(prompt) for prompt in prompts)
        self._check_length(longest, "a prompt")
        pad = self._option("pad_token_id") or 0
        ids = torch.tensor([[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts])
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        self._mask = (torch.arange(longest) < lengths).long()
        self._encoded = self.model.get_encoder()(input_ids=ids, attention_mask=self._mask, return_dict=True)
        self._cache, self._length = EncoderDecoderCache(DynamicCache(), DynamicCache()), 0
        logits = self._forward(torch.full_like(lengths, self.start_token))
        if self._first is not None:
            others = torch.arange(logits.shape[-1]) != int(self._first)
            logits = logits.masked_fill(others, -torch.inf)
        return logits

    @torch.inference_mode()
    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Append tokens to the texts named (something to the others); the logits [B, V] after them."""
        ids = torch.zeros(len(self._mask), 1, dtype=torch.long)
        for row, token in tokens.items():
            ids[row, 0] = token
        return self._forward(ids)

    def _forward(self, ids: Tensor) -> Tensor:
        self._length += 1
        self._check_length(self._length, "a text")
        found = self.model(
            encoder_outputs=self._encoded,
            attention_mask=self._mask,
            decoder_input_ids=ids,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = found.logits[:, -1]
        if self._never:
            logits[:, self._never] = -torch.inf
        return logits

    def _option(self, name: str) -> Any:
        """The value of the generation config, else of the config, else None."""
        value = getattr(getattr(self.model, "generation_config", None), name, None)
        return getattr(self.model.config, name, None) if value is None else value

    def _check_length(self, length: int, what: str) -> None:
        if self._most is not None and length > self._most:
            raise ValueError(f"generate: {what} may have {self._most} tokens with this model, got {length}")
