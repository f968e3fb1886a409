"""Plans as data: where they come from, what they must say, how heads are counted and cut. No ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tests.harness.parallelize import tiny
from tpkernels.errors import PlanError
from tpkernels.layers.convert import Tied
from tpkernels.plan.resolved import Resolved
from tpkernels.plan.rules import Plan
from tpkernels.plan.sequence.apply import check_sequence
from tpkernels.plan.styles.alibi import LocalAlibiSlopes
from tpkernels.plan.styles.blocks import find_blocks
from tpkernels.plan.styles.heads import Heads, LocalConfig
from tpkernels.plan.styles.linear import PackedColumnStyle, RowStyle
from tpkernels.plan.styles.replicated import CountsStyle, ReplicateStyle, SumTailStyle
from tpkernels.plan.styles.style import STYLES, parse_style
from tpkernels.plan.table import plan_table
from tpkernels.plan.validate import refuse
from tpkernels.shard import ShardInfo, merge_runs, packed_runs

LLAMA = {
    "*embed_tokens": "vocab",
    "*.[qkv]_proj": "column",
    "*.o_proj": "row",
    "*.gate_proj": "column",
    "*.up_proj": "column",
    "*.down_proj": "row",
    "lm_head": "vocab_head",
}


@pytest.mark.parametrize("kv", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("R", range(1, 9))
def test_every_query_head_is_on_one_rank_beside_its_key(kv: int, group: int, R: int) -> None:
    heads = Heads(kv * group, kv)
    seen = []
    for rank in range(R):
        start, count = heads.query_of(R, rank)
        first, keys = heads.kv_of(R, rank)
        seen += range(start, start + count)
        assert all(first <= head // group < first + keys for head in range(start, start + count))
        assert keys >= 1 or kv < R or count == 0
        if count:
            assert count % keys == 0, "all keys of a rank serve as many heads"
    if kv * group >= R and (kv >= R or group >= -(-R // kv)):
        assert seen == list(range(kv * group))


def test_nine_heads_with_three_keys_are_cut_as_six_and_three() -> None:
    assert Heads(9, 3).text(2) == "9 heads / 3 kv heads over 2 ranks as 6+3 / 2+1"
    assert Heads(9, 3).text(4) == "9 heads / 3 kv heads over 4 ranks as 2+1+3+3 / 1+1+1+1 (shared)"
    assert Heads(12, 12).text(5) == "12 heads over 5 ranks as 3+3+2+2+2"


def test_packed_projections_are_cut_each_by_itself_and_assembled_again() -> None:
    runs = packed_runs([6, 4, 4], 2, [3, 2, 2])
    assert runs == (((0, 3), (6, 2), (10, 2)), ((3, 3), (8, 2), (12, 2)))
    full = torch.arange(28.0).reshape(14, 2)
    infos = [ShardInfo(0, 14, 2, rank, runs=runs) for rank in range(2)]
    parts = [info.part(full) for info in infos]
    assert [info.size for info in infos] == [7, 7]
    assert torch.equal(infos[0].assemble(parts), full)
    assert not infos[0].shared
    assert [info.owned_by(info.rank) for info in infos] == [((0, 3), (3, 2), (5, 2))] * 2
    with pytest.raises(ValueError, match=r"sizes \[7, 7\], got \[7, 6\]"):
        infos[0].assemble([parts[0], parts[1][:6]])
    assert merge_runs([(0, 2), (2, 3), (5, 0), (7, 1)]) == ((0, 5), (7, 1))


def test_shared_parts_are_owned_once() -> None:
    runs = (((0, 2),), ((0, 2),), ((2, 2),))
    infos = [ShardInfo(0, 4, 3, rank, runs=runs) for rank in range(3)]
    assert [info.owned_by(info.rank) for info in infos] == [((0, 2),), (), ((0, 2),)]
    assert all(info.shared for info in infos)


def test_of_runs_that_ranks_share_in_part_each_index_is_owned_once() -> None:
    q_and_shared_kv = packed_runs([8, 4], 4, [4, 2])  # q by itself; k and v of two heads over four ranks
    odd = (((0, 3), (6, 2)), ((2, 5),), ((1, 7), (9, 1)), ((8, 2),))
    for runs, size in ((q_and_shared_kv, 12), (odd, 10)):
        info = ShardInfo(0, size, 4, 0, runs=runs)
        owned = []
        for rank in range(4):
            part = [i for start, count in runs[rank] for i in range(start, start + count)]
            owned += [part[at] for start, count in info.owned_by(rank) for at in range(start, start + count)]
        assert sorted(owned) == list(range(size)), runs


def test_styles_are_taken_apart() -> None:
    assert parse_style("row") == RowStyle() != parse_style("row_split")
    assert parse_style("row:units=4") == RowStyle(4) != RowStyle()
    assert parse_style("packed_column:8, 2,2") == PackedColumnStyle(packed=(8, 2, 2))
    assert parse_style("counts:heads, width:units=2") == CountsStyle(2, ("heads", "width"))
    assert parse_style("sum_tail:64") == SumTailStyle(outputs=64)
    assert PackedColumnStyle(packed=(3,)).sizes(12, "m") == [4, 4, 4]
    with pytest.raises(PlanError, match=r"\['colwise'\] do not exist; the styles are \['column', "):
        parse_style("colwise")
    for text in ("packed_column", "packed_column:0", "packed_column:a", "row:3", "sum_tail:x", "counts:heads"):
        with pytest.raises(PlanError, match=text):
            parse_style(text)
    with pytest.raises(PlanError, match=r"must add up to its 13 outputs, got \[4, 4, 4\]"):
        PackedColumnStyle(packed=(3,)).sizes(13, "m")
    assert all(style.name == name for name, style in STYLES.items())


def llama(**changes: Any) -> nn.Module:
    return tiny("llama", **changes)


def test_a_plan_must_cover_every_linear_and_match_with_every_rule() -> None:
    model = llama()
    assert len(Plan(LLAMA).styles(model)) == 16
    with pytest.raises(PlanError, match=r"no rule for model.layers.0.mlp.gate_proj, .* \(2 modules\)"):
        Plan({glob: style for glob, style in LLAMA.items() if "gate" not in glob}).styles(model)
    with pytest.raises(PlanError, match=r"no module for the rules \*.w1$"):
        Plan(LLAMA | {"*.w1": "column"}).styles(model)
    with pytest.raises(PlanError, match="do not exist"):
        Plan(LLAMA | {"lm_head": "colwise"}).styles(model)
    styles = Plan(LLAMA | {"*.1.*.down_proj": "replicate"}).styles(model)
    assert styles["model.layers.1.mlp.down_proj"] == ReplicateStyle()


def test_tied_parameters_must_be_cut_alike() -> None:
    model = llama(tie_word_embeddings=True)
    modules = dict(model.named_modules())
    for head, fits in (("vocab_head", True), ("replicate", False), ("row_split", False)):
        styles = Plan(LLAMA | {"lm_head": head}).styles(model)
        cuts = Resolved.of(model, styles, 2).parameter_cuts()
        if fits:
            Tied(model).check(modules, cuts)
        else:
            with pytest.raises(PlanError, match=r"\['model.embed_tokens', 'lm_head'\] share a parameter"):
                Tied(model).check(modules, cuts)


def test_tied_parameters_are_compared_by_the_dimension_in_which_they_are_stored() -> None:
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight  # columns of the table are inputs of the linear
    for style, fits in (("column", False), ("row", True)):
        resolved = Resolved.of(model, Plan({"0": "column", "1": style}).styles(model), 2)
        if fits:
            Tied(model).check(resolved.modules, resolved.parameter_cuts())
        else:
            with pytest.raises(PlanError, match="share a parameter, so their styles must cut it alike"):
                Tied(model).check(resolved.modules, resolved.parameter_cuts())


def test_auto_takes_our_plan_then_the_shipped_one_then_a_derived_one() -> None:
    sources = {name: Plan.resolve(tiny(name)).source for name in ("gpt2", "llama", "opt")}
    assert sources == {"gpt2": "tpkernels/plan/shipped/gpt2.py", "llama": "transformers", "opt": "its module tree"}
    with pytest.raises(PlanError, match="plan must be 'auto' or"):
        Plan.resolve(llama(), "megatron")


@pytest.mark.parametrize("family", ["phi3", "gpt_oss", "deepseek_v3", "gpt2", "gpt_bigcode", "bloom"])
def test_heads_that_make_no_words_stay_whole_in_plans_of_ours(family: str) -> None:
    import transformers as hf

    config = hf.AutoConfig.for_model(family, num_hidden_layers=1)
    for top in ("SequenceClassification", "TokenClassification"):
        with torch.device("meta"):
            model = getattr(hf, f"AutoModelFor{top}").from_config(config)
        plan = Plan.resolve(model)
        assert plan.source == f"tpkernels/plan/shipped/{family}.py"
        styles = plan.styles(model)
        heads = [name for name, module in model.named_children() if isinstance(module, nn.Linear)]
        assert heads and {styles[name].name for name in heads} == {"replicate"}


def test_a_shipped_plan_that_is_silent_about_weights_inside_a_block_is_not_trusted() -> None:
    model = llama()
    assert Plan.resolve(model).source == "transformers"
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.PReLU().double()
    assert Plan.resolve(model).source == "its module tree"


def test_heads_that_nobody_takes_and_too_few_heads_are_refused() -> None:
    model = llama()
    modules = dict(model.named_modules())
    styles = Plan(LLAMA | {"*.o_proj": "replicate"}).styles(model)
    styles = {name: style for name, style in styles.items() if "down_proj" not in name}
    with pytest.raises(PlanError, match=r"self_attn makes heads in .* no row layer takes them"):
        list(find_blocks(modules, styles))
    styles = Plan(LLAMA).styles(model)
    with pytest.raises(PlanError, match="has 9 heads, which leaves some of 10 ranks with none"):
        Resolved.of(model, styles, 10)


def test_what_cannot_be_cut_is_named() -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(50, 36, dtype=torch.int8), requires_grad=False)
    with pytest.raises(PlanError, match=r"model.layers.0.mlp.up_proj.weight is torch.int8: quantised"):
        refuse(model)
    model = llama()
    model.is_quantized = True
    with pytest.raises(PlanError, match="the model is quantised"):
        refuse(model)
    with pytest.raises(PlanError, match="is compiled: cut the model first"):
        refuse(torch.compile(llama()))

    class OddLinear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.t() + 1

    model = llama()
    model.model.layers[0].mlp.up_proj = OddLinear(36, 50)
    styles = Plan(LLAMA).styles(model)
    with pytest.raises(PlanError, match="up_proj is a OddLinear with a forward of its own"):
        Resolved.of(model, styles, 2)


def test_peft_wrapped_models_are_refused() -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(PlanError, match="adapter of peft"):
        refuse(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])))


def test_sequence_parallel_says_where_it_does_not_apply() -> None:
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    blocks = ["encoder.layer.0.attention.self"]
    with pytest.raises(PlanError, match="does not apply to BertModel: its attention is not causal"):
        check_sequence(bert, dict(bert.named_modules()), blocks)
    with pytest.raises(PlanError, match="found 0 lists"):
        check_sequence(bert, dict(bert.named_modules()), [])


def test_a_local_config_answers_with_the_ranks_numbers_and_the_models_else() -> None:
    config = llama().config
    local = LocalConfig(config, num_attention_heads=3)
    assert (local.num_attention_heads, local.hidden_size) == (3, 36)
    config.hidden_size = 7
    assert copy.deepcopy(local).num_attention_heads == 3
    assert local.hidden_size == 7
    with pytest.raises(AttributeError):
        _ = local.no_such_thing


def test_counts_that_cannot_be_cut_are_refused_before_anything_is_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    plan = Plan({"0": "column:units=3", "1": "row:units=3"})
    for count, says in ((None, "got None"), (4, "got 4")):
        module = nn.Module()
        module.lanes = count
        holder = nn.ModuleDict({"pair": model, "odd": module})
        styles = {f"pair.{name}": style for name, style in plan.styles(model).items()}
        styles["odd"] = parse_style("counts:lanes:units=3")
        with pytest.raises(PlanError, match=rf"lanes of odd \(Module\) must be a multiple of 3, {says}"):
            Resolved.of(holder, styles, 2)


def test_a_module_without_a_config_has_the_heads_of_its_rank() -> None:
    block = nn.Module()
    block.qkv, block.out = nn.Linear(32, 64), nn.Linear(32, 32)
    block.n_heads, block.n_kv_heads, block.head_dim = 4, 2, 8
    model = nn.ModuleDict({"mix": block})
    styles = Plan({"mix.qkv": "packed_column:32,16,16", "mix.out": "row"}).styles(model)
    (found,) = find_blocks(dict(model.named_modules()), styles)
    assert found.local_attributes(2, 1) == {"n_kv_heads": 1, "n_heads": 2}


def test_the_table_counts_the_bias_of_a_row_layer_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    table = plan_table(model, Plan({"0": "column", "1": "row"}), 2)
    assert table.totals == (8 * 16 + 16 + 16 * 8 + 8, 64 + 8 + 64 + 8)


def test_the_table_counts_the_parameters_of_attention_blocks_by_heads() -> None:
    sizes = {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 68}
    model = tiny("gpt_oss", attention="eager", **sizes)
    replicated = ("norm.weight", "router.", "o_proj.bias")
    local = {n: p.numel() if any(r in n for r in replicated) else p.numel() // 2 for n, p in model.named_parameters()}
    assert any(n.endswith("sinks") for n in local)
    table = plan_table(model, Plan.resolve(model), 2)
    assert table.totals == (sum(p.numel() for p in model.parameters()), sum(local.values()))


def test_the_table_counts_tied_parameters_once() -> None:
    model = llama(tie_word_embeddings=True)
    table = plan_table(model, Plan.resolve(model), 2)
    assert table.totals[0] == sum(p.numel() for p in model.parameters())
    assert table.totals[0] / 2 < table.totals[1] < table.totals[0] * 0.75
    q = next(row for row in table.rows if row.name.endswith("q_proj"))
    assert (q.count, q.style, q.shape, q.parts) == (2, "column", "36 x 36", "out 24+12")
    assert table.heads == {"9 heads / 3 kv heads over 2 ranks as 6+3 / 2+1": 2}


def test_the_command_shows_the_plan_and_refuses_in_a_sentence(tmp_path: Any) -> None:
    from tpkernels.cli import app

    llama().config.save_pretrained(tmp_path)
    shown = CliRunner().invoke(app, ["plan-model", str(tmp_path), "--tp", "3"])
    assert shown.exit_code == 0, shown.output
    assert "2 attention blocks: 9 heads / 3 kv heads over 3 ranks as 3+3+3 / 1+1+1" in shown.output
    refused = CliRunner().invoke(app, ["plan-model", str(tmp_path), "--tp", "10"])
    assert refused.exit_code == 2
    assert "leaves some of 10 ranks with none" in refused.output
    assert CliRunner().invoke(app, ["plan-model", "nosuch"]).exit_code == 2


class Biased(nn.Module):
    def forward(self, x: torch.Tensor, alibi: torch.Tensor | None, mask: torch.Tensor | None = None) -> None:
        """What an attention block of BLOOM takes."""


def test_a_bias_of_all_heads_is_cut_to_those_of_the_rank_wherever_it_stands_in_the_call() -> None:
    block, x = Biased(), torch.zeros(1)
    hook = LocalAlibiSlopes(block, heads=5, start=3, count=2)
    bias = torch.arange(10.0).view(10, 1, 1).expand(10, 1, 4)  # of 5 heads, for 2 sequences
    own = bias[[3, 4, 8, 9]]
    args, kwargs = hook(block, (x, bias), {"mask": x})
    assert torch.equal(args[1], own) and args[0] is x and kwargs == {"mask": x}
    args, kwargs = hook(block, (x,), {"alibi": bias})
    assert torch.equal(kwargs["alibi"], own)
    assert hook(block, (x, None), {}) == ((x, None), {})
    with pytest.raises(PlanError, match=r"alibi must hold a bias for each of 5 heads, got shape \[4, 1, 4\]"):
        hook(block, (x, own), {})
