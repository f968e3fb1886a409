from __future__ import annotations

import copy
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.harness.generation import byte_tokenizer, save_tiny, tiny_llama
from tests.harness.ranks import nightly
from tpkernels import Group
from tpkernels.generate import Completion, Generator, Sampling
from tpkernels.generate.compiled import compiled
from tpkernels.generate.sampling import NOT_A_NUMBER, Sampler
from tpkernels.generate.text import TextStream
from tpkernels.testing import run_ranks

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)

PROMPTS = ["def f(x):", "a", "The quick brown fox jumps over"]
LONG = Sampling(max_tokens=24, ignore_eos=True)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens by forwards over everything so far, without any cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


class Letters:
    """A tokenizer whose tokens are the given texts."""

    eos_token_id = None

    def __init__(self, *texts: bytes) -> None:
        self.texts = texts

    def encode(self, text: str, **options: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Any, **options: Any) -> str:
        return b"".join(self.texts[i] for i in ids).decode(errors="replace")


def pushed(texts: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(Letters(*texts), [], stop)
    found = [stream.push(i) for i in range(len(texts))]
    return [*found, stream.flush()], stream.stopped


def test_text_comes_as_soon_as_no_stop_string_can_begin_in_it() -> None:
    assert pushed([b"a", b"b", b"c"]) == (["a", "b", "c", ""], False)
    assert pushed([b"say ", b"E", b"N", b"D", b"!"], ("END",)) == (["say ", "", "", "", "", ""], True)
    assert pushed([b"say ", b"E", b"N", b"N"], ("END",)) == (["say ", "", "", "ENN", ""], False)
    assert pushed([b"a EN"], ("END",)) == (["a ", "EN"], False)
    assert pushed([b"xxyz then xy"], ("xy", "then")) == (["x", ""], True)
    assert pushed([b"aab"], ("aab", "ab")) == (["", ""], True), "the stop string that begins first counts"


def test_a_character_of_several_tokens_comes_whole() -> None:
    sign = "\N{SNOWMAN}".encode()
    assert pushed([b"a", sign[:1], sign[1:2], sign[2:], b"b"]) == (["a", "", "", "\N{SNOWMAN}", "b", ""], False)
    assert pushed([b"a", sign[:2]])[0] == ["a", "", "\N{REPLACEMENT CHARACTER}"], "what stays half is not lost"


def test_draws_come_from_the_tokens_that_top_k_and_top_p_leave() -> None:
    p = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    logits = p.log()

    def seen(**how: Any) -> set[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=3, **how))
        return {sampler.draw(logits) for _ in range(400)}

    assert seen() == {0, 1, 2, 3, 4}
    assert seen(top_k=2) == {1, 3}
    assert seen(top_p=0.69) == {1, 3}
    assert seen(top_p=0.71) == {1, 2, 3}
    assert seen(top_k=3, top_p=0.8) == {1, 3}, "0.7 of 0.85 is over 0.8"
    for least in (1e-9, 1e-60, 5e-324):  # the last two are 0 in fp32
        assert seen(top_p=least) == seen(top_p=least, top_k=3) == {1}
    for temperature in (1e-3, 1e-38, 1e-60, 5e-324):
        assert Sampler(Sampling(temperature=temperature, seed=0)).draw(logits) == 1
    assert Sampler(Sampling()).draw(logits) == 1


def test_a_compiled_step_takes_more_shapes_than_torch_allows_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpkernels.generate.compiled.compile_fx", lambda graph, inputs, **options: graph.forward)
    step = compiled(lambda x: x * 2)
    for n in range(1, 11):
        assert torch.equal(step(torch.ones(n)), torch.full((n,), 2.0))


def test_the_nucleus_is_found_whole_when_it_is_larger_than_the_first_try() -> None:
    logits = torch.zeros(5000)
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.9, seed=1))
    drawn = {sampler.draw(logits) for _ in range(3000)}
    assert 1500 < len(drawn) <= 4501


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    p = torch.tensor([0.5, 0.3, 0.2])
    sampler, count = Sampler(Sampling(temperature=2.0, seed=7)), 4000
    drawn = torch.bincount(torch.tensor([sampler.draw(2.0 * p.log()) for _ in range(count)]), minlength=3) / count
    assert (drawn - p).abs().max() < 5 * math.sqrt(0.25 / count)


def test_a_seed_repeats_its_draws_and_nan_is_no_token() -> None:
    logits = torch.randn(300)
    first, again, other = (Sampler(Sampling(temperature=1.5, seed=s)) for s in (1, 1, 2))
    draws = [[s.draw(logits) for _ in range(20)] for s in (first, again, other)]
    assert draws[0] == draws[1] != draws[2]
    logits[7] = math.nan
    assert first.draw(logits) == Sampler(Sampling()).draw(logits) == NOT_A_NUMBER


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"max_tokens": 0}, "max_tokens must be 1 or more, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more and finite, got -1"),
        ({"temperature": math.nan}, "temperature must be 0 or more and finite, got nan"),
        ({"top_p": 0.0}, "top_p must be over 0 and at most 1, got 0"),
        ({"top_k": -2}, r"top_k must be 0 \(all\) or more, got -2"),
        ({"stop": ("a", "")}, "stop must not hold an empty string"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Sampling(**bad).check()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_prompt_of_a_batch_goes_on_as_it_would_alone_and_without_a_cache(cache: str) -> None:
    tokenizer, model = byte_tokenizer(), tiny_llama()
    want = [greedy(model, tokenizer.encode(prompt), 24) for prompt in PROMPTS]
    with Group.open() as group:
        generator = Generator(model, tokenizer, group, cache=cache)
        different = [Sampling(max_tokens=n, ignore_eos=True) for n in (24, 3, 17)]
        together = generator.generate(PROMPTS, different)
        assert [c.tokens for c in together] == [w[:n] for w, n in zip(want, (24, 3, 17), strict=True)]
        assert [c.tokens for p in PROMPTS for c in generator.generate([p], LONG)] == want
        assert [c.finish for c in together] == ["length"] * 3
        assert [c.text for c in together] == [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in together]


def test_sequences_take_and_leave_slots_between_steps_without_touching_each_other() -> None:
    from tpkernels.generate.decoders import SlotDecoder

    tokenizer, model = byte_tokenizer(), tiny_llama()
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    want = [greedy(model, prompt, 12) for prompt in ids]
    decoder = SlotDecoder(model, slots=3, max_length=64)
    got: dict[int, list[int]] = {}

    def insert(slot: int, prompt: int) -> None:
        got[prompt] = [int(decoder.insert(slot, ids[prompt]).argmax())]

    def step(where: dict[int, int]) -> None:
        logits = decoder.step({slot: got[prompt][-1] for slot, prompt in where.items()})
        for slot, prompt in where.items():
            got[prompt].append(int(logits[slot].argmax()))

    insert(1, 0)
    for _ in range(5):
        step({1: 0})
    insert(0, 1)
    for _ in range(6):
        step({0: 1, 1: 0})
    insert(2, 2)
    for _ in range(5):
        step({0: 1, 2: 2})
    for _ in range(6):
        step({2: 2})
    assert got == {0: want[0], 1: want[1], 2: want[2]}
    insert(1, 0)
    step({1: 0})
    assert got[0] == want[0][:2], "a slot that is taken again keeps nothing of the sequence before"


def test_the_compiled_step_gives_the_logits_of_the_plain_one_within_rounding() -> None:
    from tpkernels.generate.decoders import SlotDecoder

    model, prompt = tiny_llama(num_hidden_layers=1), [1, 2, 3]
    plain, fast = (SlotDecoder(model, 2, 16, compile=c) for c in (False, True))
    for decoder in (plain, fast):
        decoder.insert(0, prompt)
    exact = SlotDecoder(copy.deepcopy(model).double(), 2, 16)
    exact.insert(0, prompt)
    bound = 0.0
    for token in (5, 9, 250):
        a, b, c = (decoder.step({0: token}) for decoder in (plain, fast, exact))
        bound = max(bound, (a - c).abs().max().item())
        assert (b - c).abs().max() <= 8 * bound + 1e-6 * c.abs().max()
        assert not torch.equal(a, torch.zeros_like(a))


def test_the_products_of_a_compiled_step_are_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    from tpkernels.generate import compiled

    seen: list[Any] = []
    monkeypatch.setattr(compiled, "compile_fx", lambda graph, inputs, **kw: seen.append(graph) or graph.forward)
    w, b = torch.randn(5, 3), torch.randn(5)
    step = compiled.compiled(lambda x: torch.nn.functional.linear(x, w, b))
    for rows in (1, 4, 5):
        x = torch.randn(rows, 1, 3)
        torch.testing.assert_close(step(x), torch.nn.functional.linear(x, w, b))
        targets = [node.target for node in seen[-1].graph.nodes]
        assert (compiled.sum_of_products in targets) == (rows <= compiled.MOST_ROWS)


def test_the_end_token_stop_tokens_and_stop_strings_end_a_text() -> None:
    tokenizer, model = byte_tokenizer(), tiny_llama()
    with Group.open() as group:
        generator = Generator(model, tokenizer, group)
        (whole,) = generator.generate(["abc"], LONG)
        at = next(i for i in range(3, 24) if whole.tokens[i] not in whole.tokens[:i])
        (ended,) = generator.generate(["abc"], Sampling(max_tokens=24, stop_token_ids=(whole.tokens[at],)))
        assert ended == Completion(tokenizer.decode(whole.tokens[:at]), whole.tokens[: at + 1], "stop")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(whole.tokens[at])
        assert generator.generate(["abc"], Sampling(max_tokens=24)) == [ended]
        tokenizer.eos_token = "<end>"
        model.generation_config.eos_token_id = [256, whole.tokens[at]]  # an end of answers beside the tokenizer's
        assert generator.generate(["abc"], Sampling(max_tokens=24)) == [ended]
        assert generator.generate(["abc"], LONG) == [whole], "ignore_eos goes on past all of them"
        stop = next(t for t in (whole.text[i : i + 2] for i in range(4, 20)) if t.isascii())
        (cut,) = generator.generate(["abc"], Sampling(max_tokens=24, ignore_eos=True, stop=(stop,)))
        assert (cut.text, cut.finish) == (whole.text[: whole.text.index(stop)], "stop")


def test_bad_arguments_are_refused_before_anything_runs() -> None:
    tokenizer, model = byte_tokenizer(), tiny_llama()
    with Group.open() as group:
        with pytest.raises(ValueError, match="cache must be 'static' or 'dynamic', got 'paged'"):
            Generator(model, tokenizer, group, cache="paged")
        with pytest.raises(ValueError, match="compile needs cache 'static'"):
            Generator(model, tokenizer, group, cache="dynamic", compile=True)
        generator = Generator(model, tokenizer, group)
        with pytest.raises(ValueError, match="a prompt must have one token at least, prompt 1 has none"):
            generator.stream(["a", ""])
        with pytest.raises(ValueError, match="sampling must be one or one for each of 2 prompts, got 1"):
            generator.stream(["a", "b"], [LONG])
        with pytest.raises(ValueError, match="max_tokens"):
            generator.stream(["a"], Sampling(max_tokens=0))
        with torch.no_grad():
            model.lm_head.weight[3] = math.nan
        with pytest.raises(FloatingPointError, match="logits hold NaN"):
            generator.generate(["a"])


def test_other_families_generate_and_sliding_windows_ask_for_the_dynamic_cache() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(2)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=24, n_layer=2, n_head=3, initializer_range=0.4)).eval()
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes = {**small, "num_key_value_heads": 3, "vocab_size": 258, "initializer_range": 0.4}
    mistral = MistralForCausalLM(MistralConfig(**sizes, sliding_window=16)).eval()
    eager = tiny_llama(attn_implementation="eager")
    with Group.open() as group:
        for model in (gpt2, eager):
            for cache in ("static", "dynamic"):
                got = Generator(model, tokenizer, group, cache=cache).generate(PROMPTS[:2], LONG)
                assert [c.tokens for c in got] == [greedy(model, tokenizer.encode(p), 24) for p in PROMPTS[:2]]
        (got,) = Generator(mistral, tokenizer, group, cache="dynamic").generate(PROMPTS[:1], LONG)
        assert got.tokens == greedy(mistral, tokenizer.encode(PROMPTS[0]), 24)
        with pytest.raises(ValueError, match=r"got DynamicSlidingWindowLayer with max_length 64; take the dynamic"):
            Generator(mistral, tokenizer, group).generate(PROMPTS[:1], LONG)


def check_tiny_cut(world: int) -> dict[str, Any]:
    """Greedy and sampled tokens of a cut model, and of the whole one."""
    from tpkernels.plan.api import parallelize

    tokenizer, whole = byte_tokenizer(), tiny_llama()
    want = [greedy(whole, tokenizer.encode(prompt), 24) for prompt in PROMPTS]
    sampled: list[Any] = []
    for size in (2, world):
        place = dist.new_group(list(range(size)))
        if dist.get_rank() >= size:
            continue
        with Group.open(place) as group:
            cut = parallelize(tiny_llama(), group=group)
            for cache in ("static", "dynamic"):
                generator = Generator(cut, tokenizer, group, cache=cache)
                assert [c.tokens for c in generator.generate(PROMPTS, LONG)] == want, (size, cache)
                how = Sampling(max_tokens=24, temperature=1.3, top_p=0.9, ignore_eos=True)
                sampled.append([generator.generate(PROMPTS[:2], how), generator.generate(PROMPTS[:2], how)])
                assert sampled[-1][0] != sampled[-1][1], "without a seed every run is another"
    return {"rank": dist.get_rank(), "sampled": sampled}


def test_a_cut_model_goes_on_like_the_whole_one_and_all_ranks_sample_the_same() -> None:
    first, second, third = run_ranks(check_tiny_cut, 3, 3)
    assert first["sampled"] == second["sampled"]
    assert first["sampled"][2:] == third["sampled"]


def check_smollm2(folder: str, count: int) -> list[str]:
    """Greedy tokens of the cut model against the whole one; what they say."""
    from tpkernels.generate.load import load_whole
    from tpkernels.plan.api import parallelize

    whole, tokenizer = load_whole(folder, "fp32")
    prompt = tokenizer.encode("The theory of relativity says that")
    want: list[Any] = [None]
    alone = dist.new_group([0])
    if dist.get_rank() == 0:
        with Group.open(alone) as group:
            how = Sampling(max_tokens=count, ignore_eos=True)
            (found,) = Generator(whole, tokenizer, group, cache="dynamic").generate([prompt], how)
        want = [found.tokens]
    dist.broadcast_object_list(want)
    with Group.open() as group:
        cut = parallelize(whole, group=group)
        for cache, tokens in (("static", count), ("dynamic", 12)):
            how = Sampling(max_tokens=tokens, ignore_eos=True)
            (got,) = Generator(cut, tokenizer, group, cache=cache).generate([prompt], how)
            assert got.tokens == want[0][:tokens], (cache, tokenizer.decode(got.tokens))
    return [tokenizer.decode(want[0])]


@pytest.mark.parametrize(("R", "count"), [(2, 64), *nightly((3, 16))])
def test_smollm2_says_the_same_however_many_ranks_it_is_cut_over(smollm2: Path, R: int, count: int) -> None:
    texts = run_ranks(check_smollm2, R, str(smollm2), count)
    assert len(texts[0][0].split()) > count // 4


def test_a_folder_is_generated_from_by_the_command(tmp_path: Path) -> None:
    import subprocess
    import sys

    folder = save_tiny(tmp_path / "tiny")
    tokenizer, model = byte_tokenizer(), tiny_llama()
    want = tokenizer.decode(greedy(model, tokenizer.encode("<user>hi\n<assistant>"), 12))
    options = ["--prompt", "hi", "--chat", "--max-tokens", "12", "--ignore-eos", "--tp", "2"]
    run = subprocess.run(
        [sys.executable, "-m", "tpkernels", "generate", str(folder), *options], capture_output=True, timeout=180
    )
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.decode() == want + "\n"
    assert "12 tokens over 2 ranks" in run.stderr.decode()


def test_the_command_says_what_to_put_right(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from tpkernels.cli import app

    def error_of(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["generate", *arguments])
        assert result.exit_code == 2
        return result.stderr

    tmp_path.joinpath("empty").mkdir()
    assert "there is no model 'nowhere': name a Hugging Face folder" in error_of("nowhere", "--prompt", "a")
    assert "holds no config.json" in error_of(str(tmp_path / "empty"), "--prompt", "a")
    assert "top_p must be over 0 and at most 1, got 2" in error_of("smollm2", "--prompt", "a", "--top-p", "2")
    assert "--cache must be static or dynamic, got 'x'" in error_of("smollm2", "--prompt", "a", "--cache", "x")
