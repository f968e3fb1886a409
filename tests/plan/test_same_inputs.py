"""The ranks of a cut model must compute the same; those that do not are told so in the first training forward."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.harness.parallelize import ids, tiny
from tpkernels import parallelize
from tpkernels.comm.group import Group
from tpkernels.errors import RankMismatchError
from tpkernels.testing import run_ranks

pytest.importorskip("transformers")


def listener() -> nn.Module:
    """A model that masks by numpy's random numbers in training, as it does by default."""
    import transformers as hf

    torch.manual_seed(0)
    return hf.Wav2Vec2ForSequenceClassification(
        hf.Wav2Vec2Config(
            hidden_size=36, num_hidden_layers=1, num_attention_heads=9, intermediate_size=50, vocab_size=32,
            num_feat_extract_layers=1, conv_dim=(8,), conv_stride=(200,), conv_kernel=(200,), num_labels=3,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=12, mask_time_prob=0.5,
            mask_time_length=2, layerdrop=0.0,
        )
    )  # fmt: skip


def others_are_told() -> None:
    with Group.open() as group:
        waves = {"input_values": torch.linspace(-1, 1, 4000).view(2, -1).sin(), "labels": torch.tensor([0, 1])}
        for seed, fails in ((5, False), (group.rank, True)):
            torch.manual_seed(7)
            np.random.seed(seed)
            cut: Any = parallelize(listener(), group=group).train()
            _check(lambda cut=cut: cut(**waves), fails)
        cut = parallelize(tiny("llama"), group=group)
        again = copy.deepcopy(cut).train()
        mine = ids() if group.rank == 0 else ids().flip(1)
        cut(input_ids=mine, labels=mine)  # nobody trains
        cut.train()(input_ids=ids(), labels=ids())
        _check(lambda: again(input_ids=mine, labels=mine), True)
        other: Any = tiny("llama").train()
        with torch.no_grad():
            other.model.norm.weight.mul_(1 + 0.5 * group.rank)
        _check(lambda: parallelize(other, group=group)(input_ids=ids(), labels=ids()), True)


def _check(call: Any, fails: bool) -> None:
    if fails:
        with pytest.raises(
            RankMismatchError, match=r"rank \d of 2 has other inputs or hidden states .*seed torch, numpy"
        ):
            call()
    else:
        call()


def test_ranks_with_other_random_numbers_inputs_or_weights_are_told_at_the_first_training_forward() -> None:
    run_ranks(others_are_told, 2)
