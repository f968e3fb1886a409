"""Many types of models of transformers, each cut and compared with itself uncut, or refused in so many words.

Over the types every number of ranks meets every implementation of attention.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness import zoo_decoders, zoo_others
from tests.harness.ranks import nightly
from tests.harness.zoo import Animal, check
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks

CONFIG_MAPPING = pytest.importorskip("transformers.models.auto.configuration_auto").CONFIG_MAPPING
TABLE: dict[str, Animal] = zoo_decoders.ANIMALS | zoo_others.ANIMALS
# One of each kind; the others are run at night.
CHOICE = {
    *("gptj", "mistral", "cohere2", "falcon:mqa", "deepseek_v2", "olmoe", "olmoe:grouped_mm", "granitemoe:batched_mm"),
    *("jamba", "falcon_h1", "roformer", "mt5", "mbart", "longt5", "siglip", "wav2vec2", "gemma3", "qwen3_vl"),
    *("chinese_clip", "gemma4_text"),
}
PLACES = {name: (2 + place // 2 % 2, ("eager", "sdpa")[place % 2]) for place, name in enumerate(TABLE)}


def check_in_group(name: str, attention: str, folder: str) -> str:
    torch.set_num_threads(1)
    with Group.open() as group:
        return check(name, TABLE[name], attention, group, folder)


@pytest.mark.parametrize(
    "name",
    [name if name in CHOICE else nightly(name)[0] for name in sorted(TABLE, key=lambda name: PLACES[name][0])],
)
def test_a_cut_model_is_the_uncut_one(name: str, tmp_path: Path) -> None:
    if name.partition(":")[0] not in CONFIG_MAPPING:
        pytest.skip("needs a release of transformers that has this model")
    R, attention = PLACES[name]
    said = run_ranks(check_in_group, R, name, TABLE[name].attention or attention, str(tmp_path))
    assert len(set(said)) == 1
    assert said[0] == "refused" if TABLE[name].refused else said[0].startswith("cut ")


def test_the_table_covers_every_number_of_ranks_with_every_attention() -> None:
    everything = {(R, attention) for R in (2, 3) for attention in ("eager", "sdpa")}
    for names in (CHOICE, TABLE.keys()):
        assert {(PLACES[name][0], TABLE[name].attention or PLACES[name][1]) for name in names} == everything
    assert len({name.partition(":")[0] for name in TABLE} & set(CONFIG_MAPPING)) >= 100
