"""transformers and accelerate on a process group of tpk: the tokens and the losses that they have with gloo."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness.backends import BACKEND, REFERENCE, needs_backend, on_backend

pytest.importorskip("transformers")
pytestmark = needs_backend

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
NEW_TOKENS = 12
TORCHRUN = {"MASTER_ADDR": "127.0.0.1"}  # that it sets, and the ranks of a team lack


def prompts() -> Tensor:
    return torch.randint(2, 64, (2, 5), generator=torch.Generator().manual_seed(1))


def save(folder: Path, kind: str) -> str:
    """A tiny model with random weights, as files."""
    import transformers

    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
        model: Any = transformers.MixtralForCausalLM(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(folder / kind)
    return str(folder / kind)


def written(model: Any) -> list[list[int]]:
    """The tokens that a model draws greedily."""
    found = model.generate(prompts(), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)
    return [[int(token) for token in row] for row in found]


def generate(folder: str, options: dict[str, Any]) -> list[list[int]]:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    options = dict(options)
    if "config" in options:
        options["distributed_config"] = DistributedConfig(**options.pop("config"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    assert any(type(p.data).__name__ == "DTensor" or type(p).__name__ == "DTensor" for p in model.parameters())
    return written(model)


def trained(folder: str, output: str) -> list[float]:
    """The losses of a Trainer, whose ranks share each batch by DistributedDataParallel."""
    from accelerate.state import PartialState
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    PartialState._reset_state()
    os.environ.update(TORCHRUN)
    ids = torch.randint(2, 64, (24, 7), generator=torch.Generator().manual_seed(2))
    settings = TrainingArguments(
        output, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, seed=3,
        max_grad_norm=0.5, logging_steps=1, save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=LlamaForCausalLM.from_pretrained(folder), args=settings, train_dataset=data)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def accelerated(folder: str) -> list[float]:
    """A training loop of accelerate: prepare, backward, gather, reduce, an object to everybody."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import broadcast_object_list
    from torch.utils.data import DataLoader
    from transformers import LlamaForCausalLM

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    os.environ.update(TORCHRUN)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == dist.get_world_size()
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    ids = torch.randint(2, 64, (22, 7), generator=torch.Generator().manual_seed(2))
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(ids, batch_size=3)
    )
    losses = []
    for rows in loader:
        optimizer.zero_grad()
        loss = model(input_ids=rows, labels=rows).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        every = accelerator.gather_for_metrics(loss.detach().repeat(len(rows)))
        losses += [float(every.sum()), float(accelerator.reduce(loss.detach(), "mean"))]
    (told,) = broadcast_object_list([losses if accelerator.is_main_process else None])
    accelerator.wait_for_everyone()
    assert told == losses
    return losses


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", {"tp_plan": "auto"}),
        ("llama", {"config": {"tp_size": 2, "tp_plan": "auto"}}),
        ("mixtral", {"config": {"tp_size": 2, "ep_size": 2}}),
        ("llama", {"config": {"fsdp_size": 2}}),
    ],
    ids=["tp_plan", "tensor_parallel", "expert_parallel", "fsdp"],
)
def test_a_sharded_model_writes_the_tokens_that_it_writes_with_gloo(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = save(tmp_path, kind)
    want = on_backend(REFERENCE, generate, 2, folder, options)
    assert want[0] == written(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert on_backend(BACKEND, generate, 2, folder, copy.deepcopy(options)) == want


def test_a_trainer_has_the_losses_that_it_has_with_gloo(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama")
    want = on_backend(REFERENCE, trained, 2, folder, str(tmp_path / "out"))
    got = on_backend(BACKEND, trained, 2, folder, str(tmp_path / "out"))
    assert len(want[0]) == 4
    assert got == [pytest.approx(want[0], rel=1e-4)] * 2


def test_a_loop_of_accelerate_has_the_losses_that_it_has_with_gloo(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama")
    want = on_backend(REFERENCE, accelerated, 2, folder)
    got = on_backend(BACKEND, accelerated, 2, folder)
    assert len(want[0]) == 8
    assert got == [pytest.approx(want[0], rel=1e-4)] * 2
