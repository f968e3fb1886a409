"""What the tests of parallelize share: tiny models of many families, and the comparison with the unsharded one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels.comm.group import Group
from tpkernels.plan.api import parallelize
from tpkernels.shard import shard_info

TINY: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny(model_type: str, *, attention: str = "sdpa", **changes: Any) -> nn.Module:
    """A causal language model of that type with random fp64 weights, the same on all ranks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(TINY | changes))
    config._experts_implementation = "eager"  # the faster ones do not take fp64
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    with torch.no_grad():  # norms and biases that are all alike would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def ids(batch: int = 2, length: int = 7, vocab: int = 67) -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def close(got: Tensor, want: Tensor, what: str, tolerance: float = 1e-5, least: float = 1e-9) -> None:
    """Within a tolerance relative to the largest value, or to `least` where all are smaller.

    Everything is fp64, but the models of transformers round to fp32 in their norms and softmaxes, so that the last bit
    of a sum may become one of fp32 (6e-8), which the layers behind it amplify; a gradient that misses a part is off by
    a good deal of itself.
    """
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    error = float((got - want).detach().abs().max()) if got.numel() else 0.0
    scale = max(least, float(want.detach().abs().max()) if want.numel() else 0.0)
    assert error <= tolerance * scale, f"{what}: off by {error}, largest {scale}"


def part_of(parameter: Tensor, full: Tensor) -> Tensor:
    info = shard_info(parameter)
    return full if info is None else info.part(full)


def check_training(
    model: nn.Module, group: Group, label: str, *, forward: Callable[[nn.Module], Any] | None = None, **options: Any
) -> nn.Module:
    """Logits, loss, every gradient and one optimizer step of a cut model are those of the unsharded one."""
    whole = copy.deepcopy(model)
    cut = parallelize(model, group=group, **options)
    forward = forward or (lambda m: m(input_ids=ids(), labels=ids()))
    keys = list(whole.state_dict())
    assert list(cut.state_dict()) == keys, f"{label}: other state-dict keys"
    outputs = [forward(m) for m in (whole, cut)]
    close(outputs[1].logits, outputs[0].logits, f"{label}: logits")
    close(outputs[1].loss, outputs[0].loss, f"{label}: loss")
    compare_steps(cut, whole, [o.loss for o in outputs], label)
    return cut


def compare_steps(cut: nn.Module, whole: nn.Module, losses: list[Tensor], label: str) -> None:
    losses[0].backward()
    losses[1].backward()
    others = dict(whole.named_parameters())
    assert {name for name, _ in cut.named_parameters()} == set(others), label
    for name, parameter in cut.named_parameters():
        want = others[name].grad
        if want is None:
            assert parameter.grad is None, f"{label}: gradient of {name}"
            continue
        assert parameter.grad is not None, f"{label}: no gradient of {name}"
        close(parameter.grad, part_of(parameter, want), f"{label}: gradient of {name}")
    for module in (cut, whole):
        torch.optim.SGD(module.parameters(), lr=0.5).step()
    for name, parameter in cut.named_parameters():
        close(parameter, part_of(parameter, others[name]), f"{label}: {name} after a step")
