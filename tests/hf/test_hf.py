"""Hugging Face folders and GGUF files: read as this rank's slices, written as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness.memory import PeakMemory, needs_mallinfo2
from tpkernels import checkpoint, hf
from tpkernels.checkpoint.export import gathered
from tpkernels.checkpoint.ranks import CheckpointRanks
from tpkernels.comm.group import Group
from tpkernels.errors import CheckpointError
from tpkernels.generate.find import find
from tpkernels.shard import shard_info
from tpkernels.testing import run_ranks

transformers = pytest.importorskip("transformers", reason="needs tpkernels[hf]")


def models() -> dict[str, Any]:
    """Heads that 2 ranks cut unevenly and 3 ranks share, packed projections, experts, tied tables, position biases."""
    t = transformers
    small = {"vocab_size": 61, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2}
    even = {"hidden_size": 32, "intermediate_size": 48}  # grouped products want rows of multiples of 16 bytes
    configs = {
        "llama": t.LlamaConfig(
            **small, num_attention_heads=9, num_key_value_heads=3, head_dim=4, tie_word_embeddings=True
        ),
        "mixtral": t.MixtralConfig(**small | even, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3),
        "gpt2": t.GPT2Config(vocab_size=61, n_embd=36, n_layer=1, n_head=3, bos_token_id=0, eos_token_id=0),
        "t5": t.T5Config(vocab_size=61, d_model=24, d_ff=30, num_layers=1, num_heads=3, d_kv=8),
        "bert": t.BertConfig(**small | {"num_hidden_layers": 1}, num_attention_heads=3),
    }
    names = {
        "llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM", "gpt2": "GPT2LMHeadModel",
        "t5": "T5ForConditionalGeneration", "bert": "BertForMaskedLM",
    }  # fmt: skip
    torch.manual_seed(3)
    return {name: getattr(t, names[name])(config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    for name, model in models().items():
        model.save_pretrained(root / name, max_shard_size="5GB" if name == "gpt2" else "30KB")
    return root


def check_family(path: Path, group: Group, out: Path) -> None:
    model = hf.load_pretrained(path, group=group)
    reference = type(model).from_pretrained(path)
    mine, whole = model.state_dict(keep_vars=True), reference.state_dict()
    assert mine.keys() == whole.keys()
    assert any(shard_info(tensor) is not None for tensor in mine.values())
    for name, tensor in whole.items():
        info = shard_info(mine[name])
        assert torch.equal(mine[name], info.part(tensor) if info else tensor), name
    buffers = dict(model.named_buffers())
    for name, buffer in reference.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    for name, source in reference.all_tied_weights_keys.items():
        assert model.get_parameter(name) is model.get_parameter(source)
    assert not model.training
    assert not any(p.is_meta for p in model.parameters())
    checkpoint.export_hf(model, out, group=group, max_shard_bytes=20_000, files=[path / "config.json"])
    back = type(reference).from_pretrained(out)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, whole[name]), name
    ids = torch.arange(8)[None]
    more = {"decoder_input_ids": ids} if "T5" in type(reference).__name__ else {}
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, **more).logits, reference(input_ids=ids, **more).logits)


def check_families(folder: str, out: str) -> None:
    with Group.open() as group:
        for name in ("llama", "mixtral", "gpt2", "t5", "bert"):
            check_family(Path(folder, name), group, Path(out, name))
        model = hf.load_pretrained(Path(folder, "t5"), group=group, dtype=torch.float16)
        dtypes = {n.rpartition(".")[0].rpartition(".")[2]: p.dtype for n, p in model.named_parameters()}
        assert (dtypes["wo"], dtypes["wi"]) == (torch.float32, torch.float16), "as transformers keeps them"


def test_two_ranks_hold_the_slices_of_what_transformers_loads_and_write_what_it_loads(
    folder: Path, tmp_path: Path
) -> None:
    run_ranks(check_families, 2, str(folder), str(tmp_path))


def test_three_ranks_share_heads_and_still_hold_and_write_the_same(folder: Path, tmp_path: Path) -> None:
    run_ranks(check_families, 3, str(folder), str(tmp_path))


SIDE = 512  # matrices of 1 MiB, the largest of 4


def measure(folder: str) -> None:
    with Group.open() as group:
        hf.load_pretrained(Path(folder, "small"), group=group)  # so that nothing is imported for the first time below
        with PeakMemory() as peak:
            model = hf.load_pretrained(Path(folder, "large"), group=group)
        part = sum(p.numel() * p.element_size() for p in model.parameters())
        largest = 4 << 20
        assert part > 5 * largest
        assert part < peak.bytes + largest < part + 2.5 * largest, (part, peak.bytes)
        with PeakMemory() as peak:
            checkpoint.export_hf(model, Path(folder, "out"), group=group)
        assert peak.bytes < 2 * largest, peak.bytes  # the whole one, and a part that another rank sent


@needs_mallinfo2
def test_a_rank_never_holds_more_than_its_part_and_one_tensor(tmp_path: Path) -> None:
    for name, side in (("small", 32), ("large", SIDE)):
        config = transformers.LlamaConfig(
            vocab_size=4 * side, hidden_size=side, intermediate_size=4 * side, num_hidden_layers=3,
            num_attention_heads=4, tie_word_embeddings=False,
        )  # fmt: skip
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        state = {key: torch.full(tensor.shape, 0.5) for key, tensor in model.state_dict().items()}
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path / name)
        save_file(state, tmp_path / name / "model.safetensors", {"format": "pt"})
    run_ranks(measure, 2, str(tmp_path))


def changed(folder: Path, tmp_path: Path, **tensors: torch.Tensor | None) -> Path:
    """The one-file model with other tensors: None takes one away."""
    out = tmp_path / "changed"
    out.mkdir(exist_ok=True)
    for path in (folder / "gpt2").glob("*.json"):
        (out / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "gpt2/model.safetensors") | {k.replace("__", "."): v for k, v in tensors.items()}
    save_file({k: v for k, v in state.items() if v is not None}, out / "model.safetensors", {"format": "pt"})
    return out


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    first = "transformer__ln_f__weight"
    with pytest.raises(CheckpointError, match=r"it lacks transformer\.ln_f\.weight: is GPT2LMHeadModel the class"):
        hf.load_pretrained(changed(folder, tmp_path, **{first: None}))
    with pytest.raises(CheckpointError, match=r"it has, and the model lacks, stranger"):
        hf.load_pretrained(changed(folder, tmp_path, stranger=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"ln_f\.weight has shape \[7\] in it and \[36\] in the model"):
        hf.load_pretrained(changed(folder, tmp_path, **{first: torch.zeros(7)}))
    hf.load_pretrained(changed(folder, tmp_path, transformer__h__0__attn__bias=torch.zeros(1)))  # of old files
    out = changed(folder, tmp_path)
    data = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(data[:-5])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        hf.load_pretrained(out)
    (out / "model.safetensors").rename(out / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle, which is not opened"):
        hf.load_pretrained(out)
    with pytest.raises(CheckpointError, match=r"there is no such file or folder"):
        hf.load_pretrained(tmp_path / "nowhere")
    (out / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"its config cannot be read"):
        hf.load_pretrained(out)


def test_an_index_that_does_not_fit_its_files_is_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    out.mkdir()
    for path in (folder / "llama").iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    index = out / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    names = list(good["weight_map"])
    for change, message in (
        ({names[0]: "../model.safetensors"}, r"it names \.\./model\.safetensors, which is no file of the folder"),
        ({names[0]: "gone.safetensors"}, r"gone\.safetensors is missing"),
        ({"model.more.weight": good["weight_map"][names[0]]}, r"are not those of the index: model\.more\.weight"),
    ):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | change}))
        with pytest.raises(CheckpointError, match=message):
            hf.load_pretrained(out)
    index.write_text("[")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        hf.load_pretrained(out)


def read_gguf(path: str, as_transformers_reads_it: str) -> None:
    with Group.open() as group:
        model = hf.load_pretrained(path, group=group)
        reference = None
        if group.rank == 0:
            reference = transformers.AutoModelForCausalLM.from_pretrained(as_transformers_reads_it)
            assert dict(reference.named_parameters()).keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            whole = gathered(parameter, CheckpointRanks(group))
            if reference is not None:
                assert whole is not None
                assert torch.equal(whole, reference.get_parameter(name)), name
        if reference is not None:
            assert model.generation_config.eos_token_id == reference.generation_config.eos_token_id
            for name, buffer in reference.named_buffers():
                assert torch.equal(dict(model.named_buffers())[name], buffer), name
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_gguf_file_gives_the_values_that_transformers_gives(tmp_path: Path, smollm2: Path) -> None:
    path = find("smollm2")
    run_ranks(read_gguf, 2, str(path), str(smollm2), timeout=200.0)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError):
        hf.load_pretrained(broken)
