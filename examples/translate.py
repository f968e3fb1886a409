"""Translation with an encoder and a decoder (MarianMT, BART, T5), cut over the ranks by one line.

    torchrun --nproc-per-node 2 examples/translate.py
    torchrun --nproc-per-node 2 examples/translate.py --model FOLDER --text "Where is the station?"

FOLDER is such a model as transformers saves it, with its tokenizer: each rank reads its slices only. Without one, a
tiny MarianMT learns in some seconds to say digits in words, and is cut then; its texts must be those of the uncut one,
which every rank has here. `tpkernels generate FOLDER --prompt TEXT --tp 2` does the same without a program.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import tpkernels as tpk
from tpkernels.generate import Generator, Sampling

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PAD, END, WORD, DIGIT, VOCABULARY = 0, 1, 2, 12, 22  # the ids of "zero" and of "0" on


class Numbers:
    """A tokenizer of numbers: the source has digits, the target words."""

    eos_token_id = END

    def encode(self, text: str, **_: Any) -> list[int]:
        """Return the ids of digits, and the end."""
        return [*(DIGIT + int(letter) for letter in text), END]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """Return the words of a translation."""
        return " ".join(DIGITS[i - WORD] for i in ids if WORD <= i < DIGIT)


def trained(steps: int) -> Any:
    """A MarianMT that says three digits in words, the same on all ranks: 6 heads, 4 ranks hold 2, 2, 1 and 1."""
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 96))}
    heads = {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
    model = MarianMTModel(
        MarianConfig(
            vocab_size=VOCABULARY, d_model=48, max_position_embeddings=16, dropout=0.0, scale_embedding=True,
            pad_token_id=PAD, eos_token_id=END, bos_token_id=END, decoder_start_token_id=PAD, forced_eos_token_id=None,
            **sizes, **heads,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        numbers = torch.randint(0, 10, (64, 3))
        loss = model(input_ids=with_end(DIGIT + numbers), labels=with_end(WORD + numbers)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def with_end(ids: Tensor) -> Tensor:
    """The rows, each with the end token."""
    return torch.cat([ids, torch.full_like(ids[:, :1], END)], dim=1)


def main() -> None:
    """Translate the texts with the cut model; without a folder, also with the uncut one."""
    parser = argparse.ArgumentParser(description="Translate with a model that is cut over ranks.")
    parser.add_argument("--model", help="a folder of an encoder and a decoder, with its tokenizer")
    parser.add_argument("--text", nargs="+", default=["204", "731", "918"])
    parser.add_argument("--steps", type=int, default=150, help="of the tiny model's training")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    with tpk.Group.open() as group:
        whole, tokenizer = None, Numbers()  # type: Any, Any
        if args.model is None:
            whole = trained(args.steps)
            model = tpk.parallelize(copy.deepcopy(whole), group=group)
        else:
            from transformers import AutoTokenizer

            model = tpk.hf.load_pretrained(args.model, group=group)
            tokenizer = AutoTokenizer.from_pretrained(args.model)
        sampling = Sampling(max_tokens=min(args.max_tokens, 15) if whole is not None else args.max_tokens)
        found = Generator(model, tokenizer, group).generate(args.text, sampling)
        uncut = found if whole is None else Generator(whole, tokenizer, group).generate(args.text, sampling)
        if group.rank == 0:
            for text, translation in zip(args.text, found, strict=True):
                print(f"{text} -> {translation.text}")
        if uncut != found:
            raise SystemExit("the cut model gives another translation than the uncut one")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
