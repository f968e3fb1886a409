"""Generator: continues prompts by pieces of text, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from tpkernels.comm.group import Group, resolve

from .continuation import Completion, Continuation, Piece, ends_of
from .sampling import Sampler, Sampling, draw
from .text import Tokenizer

CACHES = ("static", "dynamic")


def is_seq2seq(model: Any) -> bool:
    """Whether the model has an encoder for the prompt and a decoder for the text."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


class Generator:
    """Continues prompts with a language model of transformers, sharded over the ranks of a group or not.

    A model with an encoder (T5, BART, MarianMT) reads the prompt and writes a text of its own, a translation perhaps.

    Every rank makes one and calls it alike; tokens and texts are the same on all of them, sampled ones too.

    Args:
        model: a decoder, or encoder and decoder, sharded by `tpk.parallelize` or not.
        tokenizer: its tokenizer.
        group: the ranks; None means all ranks of the default process group.
        cache: "static" (keys and values in memory of a fixed size) or "dynamic" (they grow, as they always do in a
            model with an encoder).
        compile: compile the decode step (static cache only): a wait of a minute at first. A prompt length and number of
            tokens that need another size of cache compile anew. Sharded models of the families of Llama need none:
            their steps are one call of C++ anyway, unless something beside their modules' products is to be computed.
        pipeline: the ranks of the stages, where the model was split by layer (`take_stages`) and this rank has one
            stage; `group` are then the ranks over which that is sharded. Caches grow.
        flights: with a pipeline, into how many parts prompts are divided that pass through the stages one behind the
            other; None: as many as stages, so that each computes while the others do.

    Raises:
        ValueError: cache, compile or flights do not fit; the model cannot be generated from, or needs the dynamic
            cache.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        group: Group | None = None,
        *,
        cache: str = "static",
        compile: bool = False,
        pipeline: Group | None = None,
        flights: int | None = None,
    ) -> None:
        if cache not in CACHES:
            raise ValueError(f"generate: cache must be {' or '.join(map(repr, CACHES))}, got {cache!r}")
        if compile and cache != "static":
            raise ValueError("generate: compile needs cache 'static', got 'dynamic'")
        if compile and is_seq2seq(model):
            raise ValueError("generate: a model with an encoder cannot be compiled: leave out compile")
        if pipeline is not None and (compile or is_seq2seq(model)):
            raise ValueError("generate: a model in pipeline stages must be a decoder, and is not compiled")
        if flights is not None and (pipeline is None or flights < 1):
            raise ValueError(f"generate: flights must be 1 or more, and need a pipeline, got {flights}")
        if pipeline is None and getattr(model, "tpk_stages", None) is not None:
            raise ValueError("generate: the model has some pipeline stages only: give pipeline, the stages' ranks")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.group = resolve(group)
        self._cache, self._compile = cache, compile
        self._pipeline, self._flights = pipeline, flights
        self._decoder: Any = None

    def stream(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> Iterator[Piece]:
        """Continue all prompts together; yield the pieces of each step.

        Every rank must consume all pieces, or all must stop after the same one.

        Args:
            prompts: texts or token ids, one token at least each.
            sampling: for all, or one for each; None takes the likeliest tokens.

        Raises:
            ValueError: a prompt or sampling does not fit.
            FloatingPointError: the model's logits hold NaN.
            TimeoutError, PeerLostError: a rank did not take part, or died; the text names it.
        """
        ids = [self._ids(prompt) for prompt in prompts]
        every = [sampling or Sampling()] * len(ids) if not isinstance(sampling, Sequence) else list(sampling)
        self._check(ids, every)
        if not ids:
            return iter(())
        if self._pipeline is None:
            return self._pieces(ids, every)
        from .staged import staged_pieces

        count = min(len(ids), self._flights or self._pipeline.world_size)
        return staged_pieces(self.model, self.tokenizer, self.group, self._pipeline, count, ids, every)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Completion]:
        """Return all that `stream` yields, by prompt. Collective.

        Args:
            prompts, sampling: as for `stream`.

        Raises:
            ValueError, FloatingPointError, TimeoutError, PeerLostError: as for `stream`.
        """
        texts, tokens, finish = [""] * len(prompts), [list[int]() for _ in prompts], [""] * len(prompts)
        for piece in self.stream(prompts, sampling):
            texts[piece.index] += piece.text
            tokens[piece.index].append(piece.token)
            finish[piece.index] = piece.finish or ""
        return [Completion(*found) for found in zip(texts, tokens, finish, strict=True)]

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        return list(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else list(prompt)

    def _check(self, ids: list[list[int]], every: list[Sampling]) -> None:
        if len(every) != len(ids):
            raise ValueError(f"generate: sampling must be one or one for each of {len(ids)} prompts, got {len(every)}")
        for index, prompt in enumerate(ids):
            if not prompt:
                raise ValueError(f"generate: a prompt must have one token at least, prompt {index} has none")
        for sampling in every:
            sampling.check()

    def _pieces(self, prompts: list[list[int]], every: list[Sampling]) -> Iterator[Piece]:
        needed = max(len(p) + s.max_tokens for p, s in zip(prompts, every, strict=True))
        decoder = self._decoder_for(len(prompts), needed)
        before = [[decoder.start_token]] * len(prompts) if is_seq2seq(self.model) else prompts
        ends = ends_of(self.model, self.tokenizer)
        running = {
            i: (Continuation(p, s, self.tokenizer, ends), Sampler(s))
            for i, (p, s) in enumerate(zip(before, every, strict=True))
        }
        logits = decoder.start(prompts)
        while True:
            rows = range(min(len(prompts), len(logits)))
            drawn = draw([running[i][1] if i in running else None for i in rows], logits, self.group)
            for i, (sequence, _) in list(running.items()):
                text = sequence.push(drawn[i])
                if sequence.finish:
                    del running[i]
                yield Piece(i, drawn[i], text, sequence.finish)
            if not running:
                return
            logits = decoder.step({i: drawn[i] for i in running})

    def _decoder_for(self, rows: int, length: int) -> Any:
        from . import decoders, seq2seq

        if is_seq2seq(self.model):
            return seq2seq.Seq2SeqDecoder(self.model)
        if self._cache == "dynamic":
            return decoders.DynamicDecoder(self.model)
        kept = self._decoder
        if kept is None or kept.slots != rows or kept.max_length < length:
            self._decoder = decoders.SlotDecoder(self.model, rows, decoders.rounded_up(length), compile=self._compile)
        return self._decoder
