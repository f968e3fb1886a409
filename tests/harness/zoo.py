"""The zoo: one tiny model of each of many types of transformers, cut and compared with itself uncut, in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.harness.parallelize import close, part_of
from tpkernels import parallelize
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError

# 9 heads with 3 keys, 50 hidden units and 67 words divide by neither 2 nor 3 where they may not.
TINY: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OUTPUTS = (
    "logits", "last_hidden_state", "logits_per_image", "image_embeds", "text_embeds", "encoder_last_hidden_state",
    "prediction_logits", "start_logits", "pred_boxes", "pooler_output", "predicted_depth",
)  # fmt: skip


@dataclass
class Animal:
    """A row of the table.

    Attributes:
        config: changes of TINY, or a function that makes the model.
        auto: the class of transformers' auto classes that makes it.
        inputs: what it is called with; None: token ids and labels.
        generates: whether `generate` is compared, too, and with which inputs ({} for those above without labels).
        attention: "eager", "sdpa"; "" chooses by the place in the table.
        refused: the text of the PlanError that refuses it; "" where it is cut.
        experts: the implementation of a mixture's experts; the faster ones do not take fp64.
        tolerance: relative to the largest value.
        saves: whether save_pretrained and from_pretrained are compared.
    """

    config: dict[str, Any] | Callable[[str], nn.Module] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    inputs: Callable[[], dict[str, Any]] | None = None
    generates: dict[str, Any] | None = None
    attention: str = ""
    refused: str = ""
    experts: str = "eager"
    tolerance: float = 1e-5
    saves: bool = True
    double: bool = True  # fp64, or fp32 where a model takes nothing else
    plain: bool = False  # the config takes nothing of TINY


def tokens(batch: int = 2, length: int = 7, high: int = 60, seed: int = 1) -> Tensor:
    return torch.randint(3, high, (batch, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(name: str, animal: Animal, attention: str) -> nn.Module:
    """The whole model, the same on all ranks."""
    import transformers as hf

    torch.manual_seed(0)
    if callable(animal.config):
        model = animal.config(attention)
    else:
        config = hf.AutoConfig.for_model(name.partition(":")[0], **(({} if animal.plain else TINY) | animal.config))
        model = getattr(hf, animal.auto).from_config(config, attn_implementation=attention)
    if hasattr(model, "set_experts_implementation") and animal.experts:
        model.set_experts_implementation(animal.experts)
    model = model.to(torch.float64 if animal.double else torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what starts as zeros or ones would hide mistakes
        for parameter in (p for p in model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise * (0.3 if parameter.dim() == 1 else 0.05)).to(parameter.dtype))
    return model


def check(name: str, animal: Animal, attention: str, group: Group, folder: str) -> str:
    """Outputs, loss, gradients, a step, generate, save and load of a cut model are those of the uncut one."""
    whole = make(name, animal, attention)
    if animal.refused:
        before = [(type(m), len(vars(m))) for m in whole.modules()]
        try:
            parallelize(whole, group=group)
        except PlanError as error:
            assert animal.refused in str(error), f"{name}: {error}"
            assert [(type(m), len(vars(m))) for m in whole.modules()] == before, f"{name}: changed"
            return "refused"
        raise AssertionError(f"{name}: it is not refused")
    cut = parallelize(copy.deepcopy(whole), group=group)
    given = animal.inputs() if animal.inputs else {"input_ids": tokens(), "labels": tokens()}
    dtype = next(p.dtype for p in whole.parameters() if p.is_floating_point())
    given = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, given)
    assert list(cut.state_dict()) == list(whole.state_dict()), f"{name}: other state-dict keys"
    outputs = [_call(model, given) for model in (whole, cut)]
    names = [n for n in OUTPUTS if isinstance(outputs[0].get(n), Tensor)]
    assert names, f"{name}: nothing to compare in {list(outputs[0])}"
    losses = [_loss(output, names) for output in outputs]
    for n in names:
        close(outputs[1][n], outputs[0][n], f"{name}: {n}", animal.tolerance)
    close(losses[1], losses[0], f"{name}: loss", animal.tolerance)
    if animal.generates is not None:
        call = {k: v for k, v in given.items() if k != "labels"} | animal.generates
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        tokens_of = [model.generate(**call, **options) for model in (whole, cut)]
        assert torch.equal(tokens_of[0], tokens_of[1]), f"{name}: generate"
    _step(name, whole, cut, losses, animal.tolerance)
    if animal.saves:
        _save(name, cut, given, names, animal, attention, folder)
    return str(cut.tpk_plan)


def _call(model: nn.Module, given: dict[str, Any]) -> Any:
    torch.manual_seed(3)  # some draw numbers in evaluation, too
    return model(**given)


def _loss(output: Any, names: list[str]) -> Tensor:
    loss = output.get("loss")
    if loss is not None:
        return loss
    values = [(output[n].double() * noise(*output[n].shape, seed=i)).sum() for i, n in enumerate(names)]
    return torch.stack(values).sum()


def _step(name: str, whole: nn.Module, cut: nn.Module, losses: list[Tensor], tolerance: float) -> None:
    for loss in losses:
        loss.backward()
    others = dict(whole.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in others.values() if p.grad is not None and p.numel())
    for key, p in cut.named_parameters():
        want = others[key].grad
        if want is None or p.grad is None:
            missing = want if p.grad is None else p.grad
            assert missing is None or float(missing.abs().max()) <= 1e-12 * largest, f"{name}: gradient of {key}"
            continue
        want = part_of(p, want)
        assert p.grad.shape == want.shape, f"{name}: gradient of {key}"
        if want.numel():  # one that is zero up to rounding has no scale of its own
            error, scale = float((p.grad - want).abs().max()), float(want.abs().max())
            assert error <= 10 * tolerance * max(scale, 1e-4 * largest), (
                f"{name}: gradient of {key}: {error} of {scale}"
            )
    for model in (whole, cut):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    for key, p in cut.named_parameters():
        close(p, part_of(p, others[key]), f"{name}: {key} after a step", 10 * tolerance)


def _save(
    name: str, cut: Any, given: dict[str, Any], names: list[str], animal: Animal, attention: str, folder: str
) -> None:
    cut.save_pretrained(folder)
    dtype = next(p.dtype for p in cut.parameters() if p.is_floating_point())
    back = type(cut).from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    if hasattr(back, "set_experts_implementation") and animal.experts:
        back.set_experts_implementation(animal.experts)
    for buffer, other in zip(back.buffers(), cut.buffers(), strict=True):
        if buffer.is_floating_point() and buffer.shape == other.shape:
            buffer.data = other.data.clone()  # what is not saved was made in another precision
    with torch.no_grad():
        outputs = [_call(model, given) for model in (cut, back)]
    for n in names:
        close(outputs[1][n], outputs[0][n], f"{name}: {n}, saved and loaded", animal.tolerance)
