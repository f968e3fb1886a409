"""load_pretrained of pipeline stages: the parameters of the whole model, each on its stage, and no more in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.harness.memory import PeakMemory, needs_mallinfo2
from tests.harness.parallelize import part_of
from tests.harness.pipelines import batch_of
from tpkernels import hf
from tpkernels.comm.mesh import Mesh
from tpkernels.pipeline import Pipeline
from tpkernels.testing import run_ranks


def check_loaded_stages(folder: str) -> None:
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    with Mesh.open(pp=2, tp=2) as mesh:
        with PeakMemory() as peak:
            model = hf.load_pretrained(folder, group=mesh.tp, pipeline=mesh.pp)
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        whole = LlamaForCausalLM.from_pretrained(folder).eval()
        full = sum(p.numel() * p.element_size() for p in whole.parameters())
        assert held < 0.35 * full
        assert peak.bytes < 0.6 * full, (peak.bytes, held, full)
        others = dict(whole.named_parameters(remove_duplicate=False))
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, part_of(parameter, others[name])), name
        assert ("lm_head.weight" in dict(model.named_parameters())) == (mesh.stage == 1)
        assert mesh.pp is not None
        pipe = Pipeline(model.tpk_stages, group=mesh.pp, micro_batches=2)
        got, want = pipe.evaluate(**batch_of(0)), whole(**batch_of(0)).loss
        assert abs(float(got) - float(want)) < 1e-5 * float(want)


@needs_mallinfo2
def test_each_rank_reads_its_shards_of_its_stages_only(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    run_ranks(check_loaded_stages, 4, str(tmp_path / "model"))
