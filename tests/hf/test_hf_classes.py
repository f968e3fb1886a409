"""Hugging Face folders that are loaded into other classes, dtypes and variants, and folders that are refused."""

from __future__ import annotations

import json
import warnings
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tpkernels import checkpoint, hf
from tpkernels.comm.group import Group
from tpkernels.errors import CheckpointError
from tpkernels.shard import shard_info
from tpkernels.testing import run_ranks

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SEQ2SEQ = {
    "vocab_size": 61, "d_model": 36, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 9,
    "decoder_attention_heads": 9, "encoder_ffn_dim": 50, "decoder_ffn_dim": 50, "max_position_embeddings": 32,
    "pad_token_id": 60, "eos_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 60,
}  # fmt: skip


def models() -> dict[str, Any]:
    t = transformers
    small = {"vocab_size": 61, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 1}
    torch.manual_seed(3)
    return {
        "llama": t.LlamaForCausalLM(t.LlamaConfig(**small, num_attention_heads=9, num_key_value_heads=3, head_dim=4)),
        "bert": t.BertForMaskedLM(t.BertConfig(**small, num_attention_heads=3)),
        "gpt2": t.GPT2LMHeadModel(t.GPT2Config(vocab_size=61, n_embd=36, n_layer=1, n_head=3, pad_token_id=0)),
        "t5": t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=61, d_model=24, d_ff=30, num_layers=1, num_heads=3, d_kv=8)
        ),
        "marian": t.MarianMTModel(t.MarianConfig(**SEQ2SEQ)),
        "base": t.LlamaModel(t.LlamaConfig(**small, num_attention_heads=9, num_key_value_heads=3, head_dim=4)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    for name, model in models().items():
        model.save_pretrained(root / name, max_shard_size="5GB" if name == "llama" else "30KB")
    return root


CLASSES = [  # (folder, class to load into, whether a warning names what is new, and what is left out)
    ("llama", "LlamaForCausalLM", None, None),
    ("llama", "AutoModelForSequenceClassification", "score.weight", "lm_head.weight"),
    ("llama", "AutoModelForTokenClassification", "score.bias", "lm_head.weight"),
    ("llama", "AutoModel", None, "lm_head.weight"),
    ("base", "AutoModelForCausalLM", "lm_head.weight", None),
    ("bert", "AutoModel", "pooler.dense.bias", "cls.predictions.bias"),
    ("bert", "AutoModelForQuestionAnswering", "qa_outputs.weight", "cls.predictions.bias"),
    ("gpt2", "AutoModel", None, None),
    ("gpt2", "AutoModelForSequenceClassification", "score.weight", None),
    ("t5", "T5EncoderModel", None, None),
    ("marian", None, None, None),
    ("marian", "AutoModelForSeq2SeqLM", None, None),
]


def load_into(root: str) -> None:
    with Group.open() as group:
        for name, kind, new, left_out in CLASSES:
            path, model_class = Path(root, name), None if kind is None else getattr(transformers, kind)
            torch.manual_seed(5 if group.rank == 0 else 6)
            mine = torch.get_rng_state()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = hf.load_pretrained(path, group=group, model_class=model_class)
            texts = [str(w.message) for w in caught if "load_pretrained" in str(w.message)]
            assert len(texts) == int(group.rank == 0 and (new is not None or left_out is not None)), (name, kind, texts)
            assert all(part in texts[0] for part in (new, left_out) if part and texts), texts
            assert group.rank == 0 or torch.equal(torch.get_rng_state(), mine), "only rank 0 has drawn"
            torch.manual_seed(5)
            reference = type(model).from_pretrained(path)
            assert_same(model, reference)


def assert_same(model: Any, reference: Any) -> None:
    """The cut model is that of transformers, with the same random numbers for what is new."""
    mine, whole = model.state_dict(keep_vars=True), reference.state_dict()
    assert mine.keys() == whole.keys()
    for name, tensor in whole.items():
        info = shard_info(mine[name])
        assert torch.equal(mine[name], info.part(tensor) if info else tensor), (type(model).__name__, name)
    ids = torch.arange(8)[None]
    more = {"decoder_input_ids": ids} if "decoder_input_ids" in signature(reference.forward).parameters else {}
    with torch.no_grad():
        got, want = model(input_ids=ids, **more)[0], reference(input_ids=ids, **more)[0]
    torch.testing.assert_close(got, want)


def test_a_folder_is_loaded_into_other_classes_as_transformers_does_it(folder: Path) -> None:
    run_ranks(load_into, 2, str(folder))


def options(root: str) -> None:
    with Group.open() as group:
        path = Path(root, "llama")
        for dtype, want in (("auto", torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)):
            model = hf.load_pretrained(path, group=group, dtype=dtype)
            assert {p.dtype for p in model.parameters()} == {want}
        model = hf.load_pretrained(path, group=group, gather_logits=False, codec="bf16", grad_codec="fp16")
        ids = torch.arange(8)[None]
        logits = model(input_ids=ids, labels=ids).logits
        assert sum(group.all_gather_ints(logits.shape[-1])) == 61
        codecs = {(m.codec, m.grad_codec) for m in model.modules() if hasattr(m, "codec")}
        assert codecs == {("bf16", "fp16")}


def test_dtype_codecs_and_cut_logits_are_passed_on(folder: Path) -> None:
    run_ranks(options, 2, str(folder))


def copied(folder: Path, out: Path, change: dict[str, Any] | None = None) -> Path:
    """A copy of the folder, with other fields in its config."""
    out.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((out / "config.json").read_text()) | (change or {})
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "of its own"])
def test_a_quantised_folder_is_refused_as_such(folder: Path, tmp_path: Path, method: str) -> None:
    quantised = {"quantization_config": {"quant_method": method, "load_in_4bit": True, "bits": 4}}
    out = copied(folder / "llama", tmp_path / "x", quantised)
    for config in (None, transformers.LlamaConfig.from_pretrained(folder / "llama")):
        with pytest.raises(CheckpointError, match=rf"its weights are quantised \({method}; quantization_config"):
            hf.load_pretrained(out, config=config)


def test_packed_weights_without_a_word_in_the_config_are_refused(folder: Path, tmp_path: Path) -> None:
    out = copied(folder / "llama", tmp_path / "x")
    state = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(state | {name: torch.zeros(50, 36, dtype=torch.int8)}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} is torch\.int8 in it, as quantised weights are"):
        hf.load_pretrained(out)


def test_a_variant_is_read_where_it_is_asked_for_and_named_where_it_is_not(folder: Path, tmp_path: Path) -> None:
    out = copied(folder / "llama", tmp_path / "x")
    (out / "model.safetensors").rename(out / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"has model\.fp16\.safetensors: pass variant="):
        hf.load_pretrained(out)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder / "llama")
    assert_same(hf.load_pretrained(out, variant="fp16"), reference)
    reference.save_pretrained(tmp_path / "many", variant="fp16", max_shard_size="20KB")
    assert_same(hf.load_pretrained(tmp_path / "many", variant="fp16"), reference)


def test_a_class_of_ones_own_keeps_its_new_buffers_and_draws_its_new_weights(folder: Path) -> None:
    class Own(transformers.LlamaForCausalLM):  # type: ignore[misc]
        """With a layer and a buffer that were not saved."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.more = torch.nn.Linear(4, 3)
            self.register_buffer("seen", torch.full((2,), 7.0))
            self.post_init()

    torch.manual_seed(5)
    with pytest.warns(UserWarning, match=r"more\.bias, more\.weight, seen of Own are not in it"):
        model = hf.load_pretrained(folder / "llama", model_class=Own, plan={"*": "replicate"})
    torch.manual_seed(5)
    reference = Own.from_pretrained(folder / "llama")
    assert model.seen.tolist() == [7.0, 7.0]
    reference.seen = model.seen  # which transformers leaves without values
    assert_same(model, reference)


def test_an_unknown_dtype_and_a_class_that_has_nothing_of_the_file_are_refused(folder: Path) -> None:
    for bad in ("int8", "nonsense", torch.int32, "nn"):
        with pytest.raises(CheckpointError, match=r"dtype must be a floating dtype of torch, its name, 'auto' or None"):
            hf.load_pretrained(folder / "llama", dtype=bad)
    config = transformers.BertConfig(vocab_size=61, hidden_size=36, num_attention_heads=3, num_hidden_layers=1)
    config.architectures = ["LlamaForCausalLM"]
    with pytest.raises(CheckpointError, match=r"it lacks .*: is BertModel the class that was saved\?"):
        hf.load_pretrained(folder / "llama", config=config, model_class=transformers.BertModel)


def converted() -> dict[str, Any]:
    """Models whose files hold tensors in other shapes: packed projections, experts that may lie transposed."""
    t = transformers
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    small |= {"num_attention_heads": 6, "num_key_value_heads": 3}
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}  # square: 2 * 16 rows of 32
    torch.manual_seed(3)
    return {
        "molmo2": t.Molmo2TextModel(t.Molmo2TextConfig(**small)),
        "qwen3_vl_moe": t.Qwen3VLMoeTextModel(t.Qwen3VLMoeTextConfig(**small, **rope, **experts)),
    }


def load_converted(root: str, names: list[str]) -> None:
    with Group.open() as group:
        for name in names:
            model = hf.load_pretrained(Path(root, name), group=group)
            kind = type(model)
            assert_same(model, kind.from_pretrained(Path(root, name)))
            model.save_pretrained(Path(root, f"{name} again"))
            assert_same(model, kind.from_pretrained(Path(root, f"{name} again")))
            checkpoint.export_hf(model, Path(root, f"{name} exported"), group=group)
            assert_same(model, kind.from_pretrained(Path(root, f"{name} exported")))


def test_tensors_that_transformers_converts_by_their_shapes_are_those_of_the_full_model(tmp_path: Path) -> None:
    if not hasattr(transformers, "Molmo2TextModel"):
        pytest.skip("needs a release of transformers that has this model")
    models = converted()
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    run_ranks(load_converted, 2, str(tmp_path), list(models))
