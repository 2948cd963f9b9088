"""Train the small image tower that ships beside the CLIP text tower and scores pictures with it.

    python scripts/embedded/train_image_encoder.py --text build/text --clip build/clip \\
        --out build/image_encoder --checkpoints build/runs/image_encoder

The text tower stays as it is (Zhai et al. 2022, arXiv 2111.07991, with the towers exchanged); pictures, captions and hard negatives are those of
`train_clip.py`, half of the pictures blurred, as a codec leaves them. Run the same command again to resume.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from train_clip import WIDTH, batch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from tu_diffuse.text_encoders.clip import CLIPText, CLIPTextConfig
from tu_diffuse.text_encoders.tokenizer import load_tokenizer
from tu_diffuse.training.loop import train
from tu_diffuse.training.train_config import TrainConfig
from tu_diffuse.weights import load_weights
from world import SIDE

SHAPE = CLIPVisionConfig(
    image_size=64,
    patch_size=8,
    hidden_size=64,
    intermediate_size=184,
    num_hidden_layers=3,
    num_attention_heads=4,
    hidden_act="gelu",
    projection_dim=WIDTH,
)


class ImageTower(nn.Module):
    """What is trained: the tower, and the scale of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = CLIPVisionModelWithProjection(SHAPE)
        self.logit_scale = nn.Parameter(torch.tensor(float(np.log(1 / 0.07))))


def softened(pictures: Tensor, step: int) -> Tensor:
    """The pictures (n, 3, SIDE, SIDE), every second one sent through a smaller size."""
    small = F.interpolate(pictures[::2], size=(44, 56, 72, 96)[step % 4], mode="bilinear", antialias=True)
    blurred = F.interpolate(small, size=SIDE, mode="bilinear")
    return torch.stack([blurred, pictures[1::2]], dim=1).flatten(0, 1)


def main() -> None:
    """Train, then write the tower in transformers' layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with tokenizer/")
    parser.add_argument("--clip", type=Path, required=True, help="folder of the text tower")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True, help="checkpoints")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(options.text / "tokenizer")
    shape = CLIPTextConfig.from_dict(json.loads((options.clip / "config.json").read_text()))
    text = load_weights(CLIPText(shape, projection=True), options.clip, stem="model").eval()
    model = ImageTower()
    contrast = ClipLoss()
    config = TrainConfig(steps=options.steps, lr=2e-3, warmup=100, cooldown=options.steps // 2, ema_decay=0.99, save_every=250)

    def loss_at(step: int) -> dict[str, Tensor]:
        pictures, ids = batch(tokenizer, options.batch_size, config.seed, step, side=SIDE)
        seen = F.interpolate(softened(pictures, step), size=SHAPE.image_size, mode="bilinear", antialias=True)
        with torch.autocast("cpu", torch.bfloat16):
            image = model.visual(seen).image_embeds
            with torch.no_grad():
                words = text(ids).projected
        image, words = (F.normalize(side.float(), dim=-1) for side in (image, words))
        scale = model.logit_scale.exp().clamp(max=100)
        right = ((image @ words.T).argmax(-1) == torch.arange(len(ids))).float().mean()
        return {"loss": contrast(image, words, scale), "accuracy": right.detach()}

    trained = train(model, loss_at, config, options.checkpoints, lambda line: print(line, flush=True))
    trained.visual.save_pretrained(options.out)


if __name__ == "__main__":
    main()
