"""Decoding steps of all layers in one call: against fp64, beside the modules, and where the modules must run."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.harness.generation import tiny_llama
from tpkernels import Group, parallelize
from tpkernels._native import _C
from tpkernels.layers.base import ParallelModule
from tpkernels.testing import run_ranks

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)

from tpkernels.generate.decoders import MOST_TOGETHER, DynamicDecoder, SlotDecoder
from tpkernels.generate.stack import MOST_ROWS, Stack

STEPS = 6
PROMPTS = [[1, 2, 3], [70, 80, 90, 100, 110], [5]]
DTYPES = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROUNDINGS = 40.0  # of the largest logit, behind two layers that round a dozen times each; measured: 8 at most


def other_family(name: str) -> Any:
    """A tiny model of another family whose steps are one call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 258, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "initializer_range": 0.3,
        "sliding_window": None, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval()
        for linear_name, parameter in model.named_parameters():
            if linear_name.endswith("bias"):
                nn.init.normal_(parameter)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "llama tied": lambda: tiny_llama(tie_word_embeddings=True),
    "llama, biases of q, k, v alone": lambda: other_family("qwen2"),
    "mistral": lambda: other_family("mistral"),
}


def logits_of(model: Any, sequences: list[list[int]]) -> Tensor:
    """Behind the last tokens, without any cache."""
    with torch.inference_mode():
        return torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in sequences])


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step that was tried in one call was made so."""
    made = list[bool]()
    real = _C.decode_step

    def decode_step(*args: Any) -> bool:
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(_C, "decode_step", decode_step)
    return made


def check_steps(group: Group, make: Callable[[], Any], dtype: torch.dtype) -> None:
    """Three sequences of different lengths, against the whole model in fp64."""
    whole = make().to(dtype)
    exact = copy.deepcopy(whole).double()
    decoder = SlotDecoder(parallelize(whole, group=group), 4, 64)
    assert decoder._stack is not None
    decoder.start(PROMPTS)
    sequences = [list(prompt) for prompt in PROMPTS]
    for step in range(STEPS):
        tokens = {slot: (37 * step + 11 * slot) % 258 for slot in range(len(PROMPTS))}
        for slot, token in tokens.items():
            sequences[slot].append(token)
        got, want = decoder.step(tokens)[: len(PROMPTS)].double(), logits_of(exact, sequences)
        assert (got - want).abs().max() <= ROUNDINGS * DTYPES[dtype] * want.abs().max(), (dtype, step)


def check_families(_: int) -> bool:
    with Group.open() as group, pytest.MonkeyPatch.context() as patch:
        made = count_runs(patch)
        for make in MODELS.values():
            for dtype in DTYPES:
                check_steps(group, make, dtype)
    return made == [True] * (STEPS * len(MODELS) * len(DTYPES))


@pytest.mark.parametrize("R", [1, 2, 3])
def test_steps_in_one_call_are_those_of_the_whole_model_in_fp64(R: int) -> None:
    assert run_ranks(check_families, R, 0) == [True] * R


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_has_the_same_bits_beside_others_and_on_several_threads(threads: int) -> None:
    before = torch.get_num_threads()
    with Group.open() as group:
        model = parallelize(tiny_llama(intermediate_size=4096), group=group)
        torch.set_num_threads(threads)
        try:
            together, alone = SlotDecoder(model, 8, 64), SlotDecoder(model, 8, 64)
            prompts = [[slot + 1, 40 + slot] for slot in range(8)]
            alone.insert(0, prompts[0])
            for slot, prompt in enumerate(prompts):
                together.insert(slot, prompt)
            for token in range(5):
                all_logits = together.step(dict.fromkeys(range(8), token))
                assert torch.equal(alone.step({0: token})[0], all_logits[0])
        finally:
            torch.set_num_threads(before)


# Of one token, of so many that a pass ends inside one, and one that runs by itself.
TOGETHER = {
    slot: [(31 * slot + 7 * i) % 258 for i in range(length)]
    for slot, length in ((0, 50), (2, MOST_TOGETHER), (3, 1), (4, 60), (5, MOST_TOGETHER + 1))
}


def check_prompts_together(_: int) -> bool:
    """Against fp64, each with the bits that it has by itself, and the step behind them.

    A long prompt is read by transformers, whose error is allowed on top: torch's attention takes exp to 20 bits where
    the CPU has AVX-512.
    """
    with Group.open() as group, pytest.MonkeyPatch.context() as patch:
        made = count_runs(patch)
        for dtype in DTYPES:
            whole = tiny_llama().to(dtype)
            exact = copy.deepcopy(whole).double()
            model = parallelize(copy.deepcopy(whole), group=group)
            together, alone = SlotDecoder(model, 6, 128), SlotDecoder(model, 6, 128)
            got = together.fill(TOGETHER, together=True)
            assert got.keys() == TOGETHER.keys()
            sequences = [[*prompt, 9] for prompt in TOGETHER.values()]
            of_whole = [logits_of(whole, ids).double() for ids in (list(TOGETHER.values()), sequences)]
            of_exact = [logits_of(exact, ids) for ids in (list(TOGETHER.values()), sequences)]
            step = together.step(dict.fromkeys(TOGETHER, 9))
            for i, (slot, prompt) in enumerate(TOGETHER.items()):
                assert torch.equal(got[slot], alone.fill({slot: prompt}, together=True)[slot])
                assert torch.equal(step[slot], alone.step({slot: 9})[slot])
                for found, near, exactly in zip((got[slot], step[slot]), of_whole, of_exact, strict=True):
                    error, largest = (found.double() - exactly[i]).abs().max(), exactly[i].abs().max()
                    allowed = (near[i] - exactly[i]).abs().max() if len(prompt) > MOST_TOGETHER else 0.0
                    assert error <= ROUNDINGS * DTYPES[dtype] * largest + allowed, (dtype, slot)
    return made == [True] * len(DTYPES) * (2 + 1 + 4 + 5)


@pytest.mark.parametrize("R", [1, 2])
def test_prompts_together_have_the_bits_that_each_has_alone(R: int) -> None:
    assert sum(map(len, TOGETHER.values())) > MOST_ROWS
    assert run_ranks(check_prompts_together, R, 0) == [True] * R


def step_of(decoder: SlotDecoder, token: int) -> Tensor:
    return decoder.step({0: token})[0]


def test_weights_that_change_between_steps_are_those_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_runs(monkeypatch)
    with Group.open() as group:
        model, other = parallelize(tiny_llama(), group=group), tiny_llama()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(-0.7)
        decoder = SlotDecoder(model, 1, 64)
        decoder.insert(0, PROMPTS[0])
        step_of(decoder, 9)
        for assign in (False, True):  # into the memory that is there, and in place of it
            model.load_state_dict(other.state_dict(), assign=assign)
            decoder.insert(0, PROMPTS[0])
            want = logits_of(other, [[*PROMPTS[0], 9]])[0]
            torch.testing.assert_close(step_of(decoder, 9), want)
    assert made == [True] * 3


def hooked(model: Any) -> Any:
    """A hook that doubles what a layer in the middle adds."""
    layer = model.model.layers[1].mlp.down_proj
    return layer.register_forward_hook(lambda module, args, output: output * 2)


def replaced(model: Any) -> Any:
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 2

    model.model.layers[1].mlp.down_proj = Twice(model.model.layers[1].mlp.down_proj)


def own_forward(model: Any) -> Any:
    mlp = model.model.layers[1].mlp
    real = mlp.forward
    mlp.forward = lambda x: real(x) * 2


@pytest.mark.parametrize("change", [hooked, replaced, own_forward])
@pytest.mark.parametrize("early", [True, False], ids=["before the decoder is made", "between two steps"])
def test_what_modules_do_beside_their_products_is_done(
    change: Callable[[Any], Any], early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_runs(monkeypatch)
    whole = tiny_llama()
    change(whole)
    want = logits_of(whole, [[*PROMPTS[0], 9]])[0]
    with Group.open() as group:
        model = parallelize(tiny_llama(), group=group)
        if early:
            change(model)
        decoder = SlotDecoder(model, 1, 64)
        if not early:
            decoder.insert(0, PROMPTS[0])
            step_of(decoder, 9)
            assert made == [True]
            change(model)
        decoder.insert(0, PROMPTS[0])
        torch.testing.assert_close(step_of(decoder, 9), want)
    assert made == [True] * (not early)


@pytest.mark.parametrize("path", ["model.layers.1.mlp", "model.layers.1.mlp.down_proj", "model.norm"])
def test_a_forward_that_a_class_gets_between_two_steps_is_run(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_runs(monkeypatch)
    with Group.open() as group:
        model = parallelize(tiny_llama(), group=group)
        decoder = SlotDecoder(model, 1, 64)
        kind: Any = type(model.get_submodule(path))
        real = kind.forward

        @functools.wraps(real)
        def twice(*args: Any, **kwargs: Any) -> Tensor:
            return real(*args, **kwargs) * 2

        def step() -> Tensor:
            decoder.insert(0, PROMPTS[0])
            return step_of(decoder, 9)

        before = step()
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", twice)
            want = logits_of(model, [[*PROMPTS[0], 9]])[0]
            assert not torch.allclose(want, before)
            torch.testing.assert_close(step(), want)
            assert made == [True]
        assert torch.equal(step(), before)
    assert made == [True, True]


def test_steps_are_one_call_again_when_a_hook_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_runs(monkeypatch)
    with Group.open() as group:
        model = parallelize(tiny_llama(), group=group)
        decoder = SlotDecoder(model, 1, 64)
        decoder.insert(0, PROMPTS[0])
        handle = hooked(model)
        step_of(decoder, 9)
        handle.remove()
        step_of(decoder, 9)
    assert made == [True]


def test_a_cache_that_grows_has_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    made, whole = count_runs(monkeypatch), tiny_llama()
    prompts = [[(7 * i) % 250 for i in range(62)], [3, 4]]
    with Group.open() as group:
        decoder = DynamicDecoder(parallelize(tiny_llama(), group=group))
        torch.testing.assert_close(decoder.start(prompts), logits_of(whole, prompts), atol=1e-4, rtol=1e-4)
        for token in range(5):
            for prompt in prompts:
                prompt.append(token)
            got = decoder.step({0: token, 1: token})
            torch.testing.assert_close(got, logits_of(whole, prompts), atol=1e-4, rtol=1e-4)
        decoder.start(prompts)
        decoder.step({1: 9})
        prompts[1] += [9, 8]
        torch.testing.assert_close(decoder.step({1: 8})[1], logits_of(whole, prompts)[1], atol=1e-4, rtol=1e-4)
    assert made == [True] * 7


def check_mixed(rank: int) -> bool:
    """One rank runs the modules, the other makes the step in one call."""
    tokens = [9, 200, 31]
    want = logits_of(tiny_llama(), [[*PROMPTS[0], *tokens[: n + 1]] for n in range(len(tokens))])
    with Group.open() as group:
        model = parallelize(tiny_llama(), group=group)
        if dist.get_rank() == 1:
            model.model.layers[0].register_forward_hook(lambda *_: None)
        decoder = SlotDecoder(model, 3, 64)
        assert (decoder._stack is None) == (dist.get_rank() == 1)
        first = decoder.fill({0: PROMPTS[0], 2: PROMPTS[1]}, together=True)
        torch.testing.assert_close(torch.stack([first[0], first[2]]), logits_of(tiny_llama(), PROMPTS[:2]))
        for token, expected in zip(tokens, want, strict=True):
            torch.testing.assert_close(step_of(decoder, token), expected)
    return True


def test_ranks_that_compute_in_two_ways_make_the_same_calls() -> None:
    assert run_ranks(check_mixed, 2, 0) == [True, True]


def check_late(rank: int) -> str:
    """Rank 1 makes no step; what rank 0 gets. Then both go on in another group."""
    place = dist.new_group([0, 1])
    group = Group.open(timeout_s=1.0)
    model = parallelize(tiny_llama(), group=group)
    decoder = SlotDecoder(model, 1, 64)
    decoder.insert(0, PROMPTS[0])
    message = ""
    if dist.get_rank() == 0:
        with pytest.raises(TimeoutError) as error:
            step_of(decoder, 9)
        message = str(error.value)
    dist.barrier()
    with Group.open(place) as other, pytest.MonkeyPatch.context() as patch:
        made = count_runs(patch)
        for module in model.modules():
            if isinstance(module, ParallelModule):
                module.set_group(other)
        decoder.insert(0, PROMPTS[0])
        torch.testing.assert_close(step_of(decoder, 9), logits_of(tiny_llama(), [[*PROMPTS[0], 9]])[0])
        assert made == [True]
    return message


def test_a_late_rank_is_named_and_a_step_uses_the_group_that_the_layers_have() -> None:
    message, other = run_ranks(check_late, 2, 0)
    assert "ranks [1]" in message and "within 1 s" in message and other == ""


def test_a_weight_that_does_not_fit_is_left_to_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_runs(monkeypatch)
    want = logits_of(tiny_llama(), [[*PROMPTS[0], 9]])[0]
    with Group.open() as group:
        model = parallelize(tiny_llama(), group=group)
        decoder = SlotDecoder(model, 1, 64)
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.data = weight.data.t().contiguous().t()
        decoder.insert(0, PROMPTS[0])
        torch.testing.assert_close(step_of(decoder, 9), want)
    assert made == [False]


def test_other_models_and_modes_are_left_to_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    made = count_runs(monkeypatch)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=24, n_layer=1, n_head=3))
    with Group.open() as group:
        for model, why in (
            (parallelize(gpt2, group=group), "the models are those of llama, mistral, qwen2, got gpt2"),
            (tiny_llama(), "not a sharded linear"),
            (parallelize(tiny_llama(hidden_act="gelu"), group=group), "the activation is not SiLU"),
            (parallelize(tiny_llama(mlp_bias=True), group=group), "without options"),
        ):
            with pytest.raises(ValueError, match=why):
                Stack(model)
        decoder = SlotDecoder(parallelize(tiny_llama(), group=group), MOST_ROWS + 1, 64)
        decoder.insert(0, PROMPTS[0])
        modes: list[Any] = [torch.autocast("cpu", torch.bfloat16), torch.profiler.profile(), torch.device("meta")]
        for mode in modes:
            assert decoder._stack is not None
            ids = torch.zeros(1, 1, dtype=torch.long)
            with mode:
                assert not decoder._stack.takes(ids)
            assert decoder._stack.takes(ids)
        decoder.start([PROMPTS[0]] * (MOST_ROWS + 1))
        decoder.step(dict.fromkeys(range(MOST_ROWS + 1), 9))
        assert made == []
        decoder.step({0: 9})
        assert made == [True]


def test_a_position_behind_the_cache_is_refused() -> None:
    with Group.open() as group:
        decoder = SlotDecoder(parallelize(tiny_llama(), group=group), 1, 8)
        decoder.insert(0, PROMPTS[0])
        for token in range(5):
            step_of(decoder, token)
        with pytest.raises(ValueError, match=r"positions must be in \[0, 8\), got 8"):
            step_of(decoder, 9)
