"""Adapters of peft on cut models: saved whole, loaded from disk, merged, blended, resumed; what is refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.harness.parallelize import close, compare_steps, ids, part_of, tiny
from tpkernels import parallelize
from tpkernels.comm.group import Group
from tpkernels.errors import CheckpointError, PlanError
from tpkernels.hf.trainer import fit_trainer, one_replica
from tpkernels.plan.adapters.apply import cut_adapters
from tpkernels.testing import run_ranks

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

TARGETS = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]


def lora(targets: list[str] = TARGETS, **options: Any) -> Any:
    return peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM", **options)


def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids()).logits
    return logits


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(input_ids=ids(), labels=ids()).loss
    return loss


def give_values(whole: Any, cut: Any, seed: int = 0) -> None:
    """The same values to all adapters of both."""
    others = dict(whole.named_parameters())
    with torch.no_grad():
        for i, (name, parameter) in enumerate(cut.named_parameters()):
            if parameter.requires_grad:
                random = torch.Generator().manual_seed(i + seed)
                value = 0.1 * torch.randn(others[name].shape, generator=random).to(parameter.dtype)
                others[name].copy_(value)
                parameter.copy_(part_of(parameter, value))


def adapted(group: Group, config: Any, family: str = "llama", **changes: Any) -> tuple[Any, Any, Any]:
    """The base model, and adapters with values on it as it is and cut."""
    base = tiny(family, **changes)
    whole = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    cut = cut_adapters(peft.get_peft_model(parallelize(copy.deepcopy(base), group=group), config))
    give_values(whole, cut)
    return base, whole, cut


MLA = {
    "kv_lora_rank": 8, "q_lora_rank": 10, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "num_key_value_heads": 9, "first_k_dense_replace": 2,
}  # fmt: skip
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
TIED = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}  # peft makes the trained copy of the head
KINDS: list[tuple[str, dict[str, Any], Any]] = [
    ("llama", {}, lora([*TARGETS, "lm_head"], rank_pattern={"q_proj": 5}, use_rslora=True)),
    ("llama", {"attention_bias": True, "mlp_bias": True}, lora(bias="lora_only")),
    ("llama", {"attention_bias": True}, lora(["q_proj", "o_proj"], lora_bias=True, modules_to_save=["lm_head"])),
    ("llama", {"tie_word_embeddings": True}, lora(["v_proj"], modules_to_save=["down_proj", "mlp.up_proj"])),
    ("llama", {}, lora(["v_proj"], modules_to_save=["embed_tokens"], init_lora_weights="gaussian")),
    ("llama", {"tie_word_embeddings": True}, lora(["v_proj"], **TIED)),
    ("deepseek_v3", MLA, lora(LATENT)),
    ("phi3", {}, lora(["qkv_proj", "gate_up_proj", "o_proj"])),
    ("gpt2", {"n_inner": 50}, lora(["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)),
]


def adapters_are_saved_whole_and_come_back(group: Group, folder: str) -> None:
    """Into the uncut model by plain peft, and onto a cut one; with the gradients and a step of the uncut."""
    for i, (family, changes, config) in enumerate(KINDS):
        what, where = f"{family} {config.target_modules} {i}", f"{folder}/{i}"
        base, whole, cut = adapted(group, config, family, **changes)
        compare_steps(cut, whole, [loss_of(m) for m in (whole, cut)], what)
        assert cut.get_nb_trainable_parameters() == whole.get_nb_trainable_parameters(), what
        want = logits_of(whole).detach()
        cut.save_pretrained(where if group.rank == 0 else f"{where}-{group.rank}")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(base), where, autocast_adapter_dtype=False)
        close(logits_of(back), want, f"{what}: loaded into the uncut model")
        for low in (False,) if config.ensure_weight_tying else (False, True):  # peft takes no marked parameter then
            again = peft.PeftModel.from_pretrained(
                parallelize(copy.deepcopy(base), group=group),
                where,
                autocast_adapter_dtype=False,
                low_cpu_mem_usage=low,
            )
            close(logits_of(again), want, f"{what}: loaded onto a cut model")
            digests = group.all_gather_ints(int(torch.rand((), dtype=torch.float64) * 2**50))
            assert len(set(digests)) == 1, "peft has drawn other amounts on each rank"
            again.save_pretrained(f"{where}-again-{group.rank}")
            saved, first = (
                load_file(f"{at}/adapter_model.safetensors") for at in (f"{where}-again-{group.rank}", where)
            )
            assert saved.keys() == first.keys() and all(torch.equal(saved[n], t) for n, t in first.items())


def test_adapters_are_saved_whole_and_come_back(tmp_path: Path) -> None:
    run_ranks(in_group, 2, adapters_are_saved_whole_and_come_back, str(tmp_path))


def in_group(run: Any, *args: Any) -> None:
    with Group.open() as group:
        run(group, *args)


def state_dicts_of_adapters_are_whole(group: Group, folder: str) -> None:
    """get_peft_model_state_dict gathers; set_peft_model_state_dict and load_adapter take whole values."""
    _, whole, cut = adapted(group, lora([*TARGETS, "lm_head"], modules_to_save=["embed_tokens"]))
    want = peft.get_peft_model_state_dict(whole)
    got = peft.get_peft_model_state_dict(cut)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    for model in (whole, cut):
        model.add_adapter("second", lora())
    cut_adapters(cut)
    for model in (whole, cut):
        model.set_adapter("second")
    give_values(whole, cut, 50)
    whole.save_pretrained(f"{folder}/own-{group.rank}")
    for name in ("default", "second"):
        path = f"{folder}/own-{group.rank}" + ("/second" if name == "second" else "")
        cut.load_adapter(path, f"again-{name}")
        for model, adapter in ((whole, name), (cut, f"again-{name}")):
            model.set_adapter(adapter)
        close(logits_of(cut), logits_of(whole), f"{name}, loaded beside others")
    values = {name: value + 0.01 for name, value in peft.get_peft_model_state_dict(whole).items()}
    peft.set_peft_model_state_dict(whole, dict(values))
    peft.set_peft_model_state_dict(cut, dict(values), adapter_name="again-default")
    whole.set_adapter("default")
    cut.set_adapter("again-default")
    close(logits_of(cut), logits_of(whole), "values set")
    with pytest.raises(PlanError, match="hotswap of an adapter does not work on a cut model"):
        from peft.utils.hotswap import hotswap_adapter

        hotswap_adapter(cut, f"{folder}/own-{group.rank}", "default")
    close(logits_of(cut), logits_of(whole), "nothing was swapped")


def transformers_loads_and_saves_them(group: Group, folder: str) -> None:
    """Without an object of peft around the model."""
    base, whole, cut = adapted(group, lora())
    cut.save_pretrained(f"{folder}/peft")
    other = parallelize(copy.deepcopy(base), group=group)
    other.load_adapter(f"{folder}/peft")
    close(logits_of(other), logits_of(whole), "load_adapter of transformers")
    assert not any(p.requires_grad for name, p in other.named_parameters() if "lora_" in name)
    with pytest.raises(PlanError, match="hotswap"):
        other.load_adapter(f"{folder}/peft", hotswap=True)
    other.save_pretrained(f"{folder}/transformers")
    group.barrier()
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/transformers")
    close(logits_of(back), logits_of(whole), "saved by transformers, loaded by peft")


def a_save_fails_on_all_ranks_or_on_none(group: Group, folder: str) -> None:
    _, _, cut = adapted(group, lora())
    with pytest.raises(ValueError, match=r"path_initial_model_for_weight_conversion does not work"):
        cut.save_pretrained(f"{folder}/converted", path_initial_model_for_weight_conversion=folder)
    Path(folder, "file").touch()
    with pytest.raises(CheckpointError, match=r"save_pretrained .*: rank 0: ValueError: .* not a file"):
        cut.save_pretrained(f"{folder}/file")
    with pytest.raises(CheckpointError, match=r"save_pretrained .*: rank 0: .*Not a directory"):
        cut.save_pretrained(f"{folder}/file/below")
    group.barrier()
    with Group.open(timeout_s=1.0) as hasty:
        base = tiny("llama", num_hidden_layers=1)
        alone = cut_adapters(peft.get_peft_model(parallelize(base, group=hasty), lora()))
        if group.rank == 0:
            with pytest.raises(TimeoutError, match=r"ranks \[1\] did not"):
                alone.save_pretrained(f"{folder}/alone")
            assert not Path(folder, "alone").exists()
        group.barrier()


def merged_adapters_are_the_parts_of_merged_ones(group: Group, folder: str) -> None:
    """merge_adapter, unmerge_adapter, unload, merge_and_unload; a merged model is saved whole, and adapted anew."""
    base, whole, cut = adapted(group, lora([*TARGETS, "lm_head"]))
    for model in (whole, cut):
        model.merge_adapter()
    for (name, mine), (_, want) in zip(cut.named_parameters(), whole.named_parameters(), strict=True):
        close(mine, part_of(mine, want), f"merged {name}", 1e-12)
    close(logits_of(cut), logits_of(whole), "merged")
    for model in (whole, cut):
        model.unmerge_adapter()
    close(logits_of(cut), logits_of(whole), "unmerged")
    before = copy.deepcopy(cut)
    close(logits_of(before.unload()), logits_of(base), "unloaded")
    merged = [model.merge_and_unload(safe_merge=True) for model in (whole, cut)]
    close(logits_of(merged[1]), logits_of(merged[0]), "merged and unloaded")
    merged[1].save_pretrained(folder)
    back = type(base).from_pretrained(folder, dtype=torch.float64).eval()
    close(logits_of(back), logits_of(merged[0]), "a merged model, saved", 1e-12)
    anew = [peft.get_peft_model(model, lora()) for model in merged]
    with pytest.raises(PlanError, match="new adapters of peft"):  # under a name that was known before
        logits_of(anew[1])
    give_values(anew[0], cut_adapters(anew[1]), 90)
    close(logits_of(anew[1]), logits_of(anew[0]), "adapted anew")
    for model in anew:
        model.delete_adapter("default")
        model.add_adapter("default", lora())
        model.set_adapter("default")
    with pytest.raises(PlanError, match="new adapters of peft"):
        logits_of(anew[1])


def blended_adapters_keep_their_values(group: Group, folder: str) -> None:
    _, whole, cut = adapted(group, lora([*TARGETS, "lm_head"]))
    for model in (whole, cut):
        model.add_adapter("second", lora([*TARGETS, "lm_head"]))
    cut_adapters(cut)
    for model in (whole, cut):
        model.set_adapter("second")
    give_values(whole, cut, 50)
    for kind in ("cat", "linear"):
        for model in (whole, cut):
            model.add_weighted_adapter(["default", "second"], [0.5, 2.0], kind, combination_type=kind)
        cut_adapters(cut)
        for model in (whole, cut):
            model.set_adapter(kind)
        close(logits_of(cut), logits_of(whole), f"blended by {kind}")
    for kind in ("svd", "ties", "magnitude_prune"):
        with pytest.raises(PlanError, match=f"combination_type='{kind}' needs full matrices"):
            cut.add_weighted_adapter(["default", "second"], [0.5, 2.0], "other", combination_type=kind, density=0.5)
    assert "other" not in cut.peft_config


def new_adapters_are_those_of_the_uncut_model(group: Group, folder: str) -> None:
    """Of the same size as one process would have drawn them, the same on all ranks where they are whole."""
    for init in (True, "gaussian"):
        torch.manual_seed(group.rank)
        cut = cut_adapters(
            peft.get_peft_model(
                parallelize(tiny("llama", hidden_size=72, intermediate_size=999), group=group),
                lora(init_lora_weights=init),
            )
        )
        A = peft.get_peft_model_state_dict(cut)["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]
        expected = 1 / 3 if init == "gaussian" else (1 / (3 * 999)) ** 0.5
        assert abs(float(A.std()) / expected - 1) < 0.1, (init, float(A.std()), expected)
        digests = group.all_gather_ints(int(torch.rand((), dtype=torch.float64) * 2**50))
        assert len(set(digests)) == 1


def prompts_of_peft_are_the_same_on_all_ranks(group: Group, folder: str) -> None:
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        peft.CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=[3, 40, 66], cpt_mask=[1] * 3, cpt_tokens_type_mask=[1, 2, 4]
        ),
    ):
        base = tiny("llama")
        torch.manual_seed(group.rank)
        cut = cut_adapters(peft.get_peft_model(parallelize(copy.deepcopy(base), group=group), config))
        whole = peft.get_peft_model(base, copy.deepcopy(config))
        others = dict(whole.named_parameters())
        with torch.no_grad():
            for name, parameter in cut.named_parameters():
                if parameter.requires_grad:
                    others[name].copy_(parameter)
        losses = [loss_of(model) for model in (whole, cut)]
        close(losses[1], losses[0], config.peft_type)
        for loss in losses:
            loss.backward()
        for name, parameter in cut.named_parameters():
            if parameter.requires_grad:
                close(parameter.grad, others[name].grad, f"{config.peft_type}: gradient of {name}")


REFUSED: list[tuple[str, Any, str]] = [
    ("llama", lora(use_dora=True), "LoRA without DoRA .* uses DoRA"),
    ("llama", lora(init_lora_weights=False), "init_lora_weights=False"),
    ("llama", lora(["embed_tokens", "q_proj"]), r"model\.embed_tokens must adapt a column or row layer.* 'replicate'"),
    (
        "llama",
        peft.LoHaConfig(r=2, target_modules=["q_proj"]),
        r"q_proj is in a peft\.tuners\.loha\..* only LoRA is known",
    ),
    ("llama", peft.LoKrConfig(r=2, target_modules=["down_proj"]), "only LoRA is known"),
    ("llama", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "only LoRA is known"),
    ("llama", peft.VeraConfig(r=2, target_modules=["q_proj"]), "only LoRA is known"),
    ("llama", peft.OFTConfig(r=0, oft_block_size=2, target_modules=["down_proj"]), "only LoRA is known"),
    (
        "llama",
        peft.AdaLoraConfig(target_modules=["q_proj"], init_r=3, target_r=2, total_step=9),
        "SVDLinear; on cut layers only LoRA is known: adapt other layers",
    ),
    ("llama", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "is PREFIX_TUNING, which does not"),
    ("qwen3_moe", lora([], target_parameters=["mlp.experts.gate_up_proj"]), "must adapt a column or row layer"),
]


def what_is_not_right_is_refused(group: Group, folder: str) -> None:
    for index in (1, 66):
        cut = parallelize(tiny("llama"), group=group)
        with pytest.raises(
            PlanError, match="trainable tokens do not work on a table of ids that is cut: leave it whol"
        ):
            peft.get_peft_model(cut, lora(["q_proj"], trainable_token_indices=[index]))
    moe = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
    for family, config, why in REFUSED:
        cut = parallelize(tiny(family, **(moe if family == "qwen3_moe" else {})), group=group)
        model = peft.get_peft_model(cut, copy.deepcopy(config))
        classes = [type(module) for module in model.modules()]
        with pytest.raises(PlanError, match=why):
            cut_adapters(model)
        assert classes == [type(module) for module in model.modules()], "nothing is changed"


def trainer_of(model: Any, folder: str, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in ids(16)]
    settings: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, "adam_epsilon": 1e-3, "use_cpu": True,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    return Trainer(model=model, args=TrainingArguments(folder, **(settings | options)), train_dataset=data)


def the_trainer_trains_saves_and_resumes_them(group: Group, folder: str) -> None:
    """Losses and adapters are those of the uncut model; a resumed run has the bits of one that went through."""
    config = lora([*TARGETS, "lm_head"], lora_dropout=0.0, modules_to_save=["embed_tokens"])
    base, whole, cut = adapted(group, config)
    cuts, runs = [cut, copy.deepcopy(cut)], []
    with one_replica():
        want = trainer_of(whole, f"{folder}/whole-{group.rank}")
        want.train()
        for model, resume in zip(cuts, (None, f"{folder}/cut/checkpoint-00000002"), strict=True):
            trainer = fit_trainer(trainer_of(model, f"{folder}/cut", save_strategy="steps", save_steps=2))
            trainer.train(resume_from_checkpoint=resume)
            runs.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
            group.barrier()
            if resume is None and group.rank == 0:
                shutil.rmtree(f"{folder}/cut/checkpoint-00000004")
            group.barrier()
    assert runs[0] == runs[1] and len(runs[0]) == 4
    losses = [row["loss"] for row in want.state.log_history if "loss" in row]
    assert all(abs(a - b) <= 1e-5 * b for a, b in zip(runs[0], losses, strict=True)), (runs, losses)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in cuts), strict=True))
    trainer.save_model(f"{folder}/saved")
    back = peft.PeftModel.from_pretrained(base, f"{folder}/saved", autocast_adapter_dtype=False)
    close(logits_of(back), logits_of(whole.eval()), "saved by the trainer")


@pytest.mark.parametrize(
    "run",
    [
        state_dicts_of_adapters_are_whole,
        transformers_loads_and_saves_them,
        a_save_fails_on_all_ranks_or_on_none,
        merged_adapters_are_the_parts_of_merged_ones,
        blended_adapters_keep_their_values,
        new_adapters_are_those_of_the_uncut_model,
        prompts_of_peft_are_the_same_on_all_ranks,
        the_trainer_trains_saves_and_resumes_them,
        what_is_not_right_is_refused,
    ],
    ids=lambda run: run.__name__,
)
def test_adapters_on_a_cut_model(run: Any, tmp_path: Path) -> None:
    run_ranks(in_group, 2, run, str(tmp_path))
