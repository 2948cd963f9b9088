"""Train the CLIP pair of the embedded model by contrast (Radford et al. 2021) with open_clip.

    python scripts/embedded/train_clip.py --text build/text --out build/clip --checkpoints build/runs/clip

Half of each batch are hard negatives of the other half (colours exchanged, relation or place mirrored), so that the pooled vector has to say
which colour belongs to which shape, and which is where. Run the same command again to resume.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import Tensor, nn
from tu_diffuse.text_encoders.clip import CLIPText, CLIPTextConfig, initialise_clip
from tu_diffuse.text_encoders.tokenizer import Tokenizer, load_tokenizer
from tu_diffuse.training.loop import train
from tu_diffuse.training.train_config import TrainConfig
from world import STAGES, captions, render, sample_scene, swap

SIDE = 64  # px of the image tower's input
WIDTH = 160
LAYERS = 3
HEADS = 5


class Pair(nn.Module):
    """The text tower that ships, and open_clip's image tower that teaches it."""

    def __init__(self, shape: CLIPTextConfig) -> None:
        super().__init__()
        self.text = CLIPText(shape, projection=True)
        initialise_clip(self.text)
        self.visual = VisionTransformer(image_size=SIDE, patch_size=8, width=128, layers=3, heads=4, mlp_ratio=4.0, output_dim=WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(float(np.log(1 / 0.07))))


def batch(tokenizer: Tokenizer, size: int, seed: int, step: int, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Pictures (size, 3, side, side) in [-1, 1] and caption ids of one step."""
    rng = random.Random(f"{seed} {step}")
    scenes = [sample_scene(rng, STAGES[rng.choice(("shapes", "shapes", "stickers", "full"))]) for _ in range(size // 2)]
    scenes += [swap(scene, rng) for scene in scenes]
    tokens = tokenizer.encode([captions(scene, rng, loose=0) for scene in scenes])
    pictures = torch.from_numpy(np.stack([render(scene, side) for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pictures, tokens.ids[:, : int(tokens.mask.sum(1).max())]


def main() -> None:
    """Train, then write `text_encoder/` in transformers' layout and the image tower beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with tokenizer/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True, help="checkpoints")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--batch-size", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(options.text / "tokenizer")
    shape = CLIPTextConfig(
        vocab_size=tokenizer.backend.get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=tokenizer.length,
        hidden_act="gelu",
        projection_dim=WIDTH,
        eos_token_id=tokenizer.suffix[0],
    )
    model = Pair(shape)
    contrast = ClipLoss()
    config = TrainConfig(steps=options.steps, lr=1e-3, warmup=50, cooldown=options.steps // 2, ema_decay=0.98, save_every=100)

    def loss_at(step: int) -> dict[str, Tensor]:
        pictures, ids = batch(tokenizer, options.batch_size, config.seed, step)
        with torch.autocast("cpu", torch.bfloat16):
            image, words = model.visual(pictures), model.text(ids).projected
        image, words = (F.normalize(side.float(), dim=-1) for side in (image, words))
        scale = model.logit_scale.exp().clamp(max=100)
        right = ((image @ words.T).argmax(-1) == torch.arange(len(ids))).float().mean()
        return {"loss": contrast(image, words, scale), "accuracy": right.detach()}

    trained = train(model, loss_at, config, options.checkpoints, lambda line: print(line, flush=True))
    options.out.mkdir(parents=True, exist_ok=True)
    for part, name in (("text.", "model.safetensors"), ("visual.", "image_tower.safetensors")):
        weights = {key.removeprefix(part): tensor.contiguous() for key, tensor in trained.state_dict().items() if key.startswith(part)}
        save_file(weights, options.out / name, metadata={"format": "pt"})
    settings = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", **shape.__dict__}
    (options.out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
