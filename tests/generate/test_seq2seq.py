"""Generation with an encoder and a decoder: cut models write what transformers' generate writes with the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.examples import in_ranks
from tests.harness.generation import byte_tokenizer
from tpkernels import Group, hf
from tpkernels.generate import Generator, Sampling
from tpkernels.generate.load import load_whole
from tpkernels.testing import run_ranks

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SIZES: dict[str, Any] = {
    "vocab_size": 258, "d_model": 48, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 6,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 257, "eos_token_id": 256, "bos_token_id": 1, "decoder_start_token_id": 257, "init_std": 0.3,
    "forced_eos_token_id": None,
}  # fmt: skip
PROMPTS = ["a short one", "one that is a good deal longer than that", "x"]
NEW = 12


def save(name: str, folder: Path) -> Path:
    t = transformers
    torch.manual_seed(4)
    if name == "t5":
        made = t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=258, d_model=48, d_ff=64, num_layers=2, num_heads=6, d_kv=8, pad_token_id=257,
                eos_token_id=256, decoder_start_token_id=257, initializer_factor=3.0,
            )
        )  # fmt: skip
    elif name == "marian":
        made = t.MarianMTModel(t.MarianConfig(**SIZES))
        made.generation_config.bad_words_ids = [[257], [1, 2]]  # as the published ones have it
    else:
        made = t.BartForConditionalGeneration(t.BartConfig(**SIZES))
        made.generation_config.forced_bos_token_id = 5
    made.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def written(root: str) -> None:
    tokenizer = byte_tokenizer()
    with Group.open() as group:
        for path in sorted(Path(root).iterdir()):
            model = hf.load_pretrained(path, group=group)
            whole = type(model).from_pretrained(path).eval()
            want = [by_transformers(whole, tokenizer.encode(prompt)) for prompt in PROMPTS]
            assert len({tuple(tokens) for tokens in want}) > 1, "the prompts are read"
            generator = Generator(model, tokenizer, group)
            for prompts in (PROMPTS, PROMPTS[1:2]):
                got = generator.generate(prompts, Sampling(max_tokens=NEW))
                assert [c.tokens for c in got] == [want[PROMPTS.index(prompt)] for prompt in prompts], path.name
            assert path.name != "bart" or all(tokens[0] == 5 for tokens in want)
            drawn = generator.generate(PROMPTS[:2], Sampling(max_tokens=NEW, temperature=1.0, seed=3))
            assert generator.generate(PROMPTS[:2], Sampling(max_tokens=NEW, temperature=1.0, seed=3)) == drawn


def by_transformers(whole: Any, ids: list[int]) -> list[int]:
    """Its own greedy generation of one prompt, without the start token."""
    found = whole.generate(torch.tensor([ids]), max_new_tokens=NEW, num_beams=1, do_sample=False)
    return [int(token) for token in found[0, 1:]]


def test_cut_encoder_decoder_models_write_what_the_whole_ones_write(tmp_path: Path) -> None:
    for name in ("t5", "marian", "bart"):
        save(name, tmp_path / name)
    run_ranks(written, 2, str(tmp_path))


def test_the_command_takes_a_folder_of_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    folder, tokenizer = save("t5", tmp_path / "t5"), byte_tokenizer()
    whole = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    want = tokenizer.decode(by_transformers(whole, tokenizer.encode(PROMPTS[0])), skip_special_tokens=True)
    model, _ = load_whole(str(folder))
    assert Generator(model, tokenizer).generate(PROMPTS[:1], Sampling(max_tokens=NEW))[0].text == want
    options = ["--prompt", PROMPTS[0], "--max-tokens", str(NEW), "--tp", "2"]
    assert in_ranks(2, "tpkernels", "generate", str(folder), *options) == want + "\n"


def test_what_cannot_be_generated_is_said(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    marian = transformers.MarianMTModel(transformers.MarianConfig(**SIZES)).eval()
    with pytest.raises(ValueError, match="a model with an encoder cannot be compiled"):
        Generator(marian, tokenizer, compile=True)
    with pytest.raises(ValueError, match=r"a prompt may have 64 tokens with this model, got 65"):
        Generator(marian, tokenizer).generate([[3] * 65])
    with pytest.raises(ValueError, match=r"a text may have 64 tokens with this model, got 65"):
        Generator(marian, tokenizer).generate([[3]], Sampling(max_tokens=70, ignore_eos=True))
    with pytest.raises(ValueError, match=r"must read and write texts .* got MarianModel"):
        Generator(marian.model, tokenizer).generate([[3]])
