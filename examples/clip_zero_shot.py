"""Zero-shot classification with CLIP, a model of text and images, cut over the ranks by one line.

    torchrun --nproc-per-node 2 examples/clip_zero_shot.py
    torchrun --nproc-per-node 2 examples/clip_zero_shot.py --model FOLDER --images cat.png dog.png --classes cat dog

FOLDER is a CLIP model as transformers saves it, with its tokenizer and image processor. Without one, a tiny CLIP with
random weights classifies synthetic pictures: its guesses mean nothing, but they must be those of the uncut model, which
the first rank computes as well. Nobody wrote a plan for CLIP: `parallelize` derives it from how its features flow.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import tpkernels as tpk

COLOURS = {"a red square": (1.0, 0.0, 0.0), "a green square": (0.0, 1.0, 0.0), "a blue square": (0.0, 0.0, 1.0)}


def tiny_clip() -> nn.Module:
    """A CLIP with random weights, the same on all ranks: 6 heads, so that 4 ranks hold 2, 2, 1 and 1."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 96}
    text = sizes | {"vocab_size": 300, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


def bytes_as_tokens(classes: list[str]) -> dict[str, Tensor]:
    """A tokenizer for the tiny model: one token a byte."""
    rows = [[1, *(3 + byte for byte in text.encode()[:28]), 2] for text in classes]
    length = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": torch.tensor([row + [2] * (length - len(row)) for row in rows]), "attention_mask": mask}


def synthetic_pictures() -> Tensor:
    """One picture for each class: a square of its colour on noise."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(len(COLOURS), 3, 32, 32, generator=generator) * 0.3
    for picture, colour in zip(pictures, COLOURS.values(), strict=True):
        picture[:, 8:24, 8:24] = 2 * torch.tensor(colour)[:, None, None]
    return pictures


def load(folder: Path, images: list[Path], classes: list[str]) -> tuple[nn.Module, dict[str, Any]]:
    """A model from a folder, and its inputs: processed images and classes."""
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    pictures = [Image.open(path).convert("RGB") for path in images]
    inputs = processor(text=classes, images=pictures, return_tensors="pt", padding=True)
    return CLIPModel.from_pretrained(folder, local_files_only=True).eval(), dict(inputs)


@torch.no_grad()
def probabilities(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """How likely each class is for each image: [images, classes]."""
    return model(**inputs).logits_per_image.softmax(dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description="zero-shot classification with a cut CLIP")
    parser.add_argument("--model", type=Path, help="folder of a CLIP model; none: a tiny one with random weights")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="pictures to classify, with --model")
    parser.add_argument("--classes", nargs="+", default=list(COLOURS), help="descriptions to choose from")
    args = parser.parse_args()
    if (args.model is None) != (not args.images):
        parser.error("--model and --images belong together")

    dist.init_process_group("gloo")
    if args.model is None:
        model, inputs = tiny_clip(), bytes_as_tokens(args.classes) | {"pixel_values": synthetic_pictures()}
        names = [f"picture {i}" for i in range(len(COLOURS))]
    else:
        model, inputs = load(args.model, args.images, args.classes)
        names = [path.name for path in args.images]
    whole = copy.deepcopy(model) if dist.get_rank() == 0 else None
    with tpk.Group.open() as group:
        tpk.parallelize(model, group=group)
        found = probabilities(model, inputs)
        if whole is not None:
            print(model.tpk_plan)
            for name, row in zip(names, found.tolist(), strict=True):
                print(f"{name}: " + ", ".join(f"{c} {p:.4f}" for c, p in zip(args.classes, row, strict=True)))
            expected = probabilities(whole, inputs)
            difference = float((found - expected).abs().max())
            print(f"largest difference from the uncut model: {difference:.1e}")
            if difference > 1e-5:
                raise SystemExit("the cut model gives other probabilities")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
