"""Teach the conditioner which word goes with which thing and where it is: lay out the scene that a caption tells.

    python scripts/embedded/train_grounding.py --text build --parent build/unet_high --checkpoints build/runs/grounding --out build/grounded

Span corruption leaves T5 guessing which colour belongs to which shape, and the denoising loss teaches the conditioner slowly: one picture says
little about one word. Here a small head (thrown away) asks the conditioner's tokens, from each cell of the 8×8 latent grid, for the kind and
colour of what is drawn there, as the U-Net's cross-attention will have to. Captions are sampled without end and need no pictures. CLIP and T5 are
frozen. Run the same command again to resume. Every 250 steps it prints the share of cells of held-out two-object scenes that are right.
"""

import argparse
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_unet import TextEncoders, new_model
from tu_diffuse.attention import attention, join_heads, key_mask, split_heads
from tu_diffuse.contracts import Conditioning
from tu_diffuse.training.loop import generator_for, train
from tu_diffuse.training.train_config import TrainConfig
from world import BACKGROUNDS, COLOURS, SHAPES, SIDE, STAGES, STICKERS, Scene, captions, extent, sample_scene

GRID = 8  # cells a side, as the latents
HEADS = 4
KINDS = (*BACKGROUNDS, *SHAPES, *STICKERS)  # what a cell can show
UNCOLOURED = len(COLOURS)  # the colour of stickers
IGNORED = -100
BACKGROUND_WEIGHT = 0.1  # of a cell without an object
DROP_CLIP, DROP_T5 = 0.3, 0.1  # CLIP is dropped often, so that much is read off T5
_STAGES = ("shapes", "stickers", "full")


@dataclass(frozen=True, eq=False)
class Layout:
    """What each cell of the scenes shows: (batch, GRID²) int64, `kind` an index of KINDS, `colour` one of COLOURS or UNCOLOURED or IGNORED."""

    kind: Tensor
    colour: Tensor


class LayoutHead(nn.Module):
    """One cross-attention from every cell to the tokens, then its kind and colour."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cells = nn.Parameter(nn.init.normal_(torch.empty(GRID**2, width)))
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, len(KINDS) + UNCOLOURED + 1))

    def forward(self, said: Conditioning) -> tuple[Tensor, Tensor]:
        """Logits of kind (batch, cells, kinds) and colour (batch, cells, colours + 1)."""
        query = split_heads(self.to_q(self.cells).expand(len(said.tokens), -1, -1), HEADS)
        key, value = (split_heads(part, HEADS) for part in self.to_kv(said.tokens).chunk(2, dim=-1))
        found = join_heads(attention(query, key, value, bias=key_mask(said.mask)))
        kind, colour = self.mlp(found).split([len(KINDS), UNCOLOURED + 1], dim=-1)
        return kind, colour


class Grounded(nn.Module):
    """The frozen text encoders with their conditioner and the head."""

    def __init__(self, folder: Path, parent: Path) -> None:
        super().__init__()
        self.encoders = TextEncoders(folder)
        self.conditioner = new_model(self.encoders.widths).conditioner
        self.conditioner.load_state_dict(load_file(parent / "conditioner" / "diffusion_pytorch_model.safetensors"))
        self.head = LayoutHead(self.conditioner.config.width)
        self.encoders.requires_grad_(False)
        for name, parameter in self.conditioner.named_parameters():
            parameter.requires_grad_(not name.startswith("pooled"))

    def forward(self, said: list[str], keep_clip: Tensor | None = None, keep_t5: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The logits of `LayoutHead` for captions; `keep_*` as in `Conditioner.forward`."""
        text = self.encoders.features(self.encoders.tokenize(said), torch.arange(len(said)))
        return self.head(self.conditioner(text.clip_tokens, text.clip_mask, text.clip_pooled, text.t5_tokens, text.t5_mask, keep_clip, keep_t5))


def layout(scenes: list[Scene]) -> Layout:
    """The cells of `scenes`: an object covers those whose centre lies in its box."""
    centres = torch.arange(GRID) * (SIDE // GRID) + SIDE // GRID // 2
    kind = torch.empty(len(scenes), GRID, GRID, dtype=torch.int64)
    colour = torch.full_like(kind, IGNORED)
    for i, scene in enumerate(scenes):
        kind[i] = KINDS.index(scene.background)
        for thing in scene.objects:
            width, height = extent(thing)
            inside = ((centres - thing.y).abs() <= height // 2)[:, None] & ((centres - thing.x).abs() <= width // 2)
            kind[i][inside] = KINDS.index(thing.kind)
            colour[i][inside] = UNCOLOURED if thing.colour is None else tuple(COLOURS).index(thing.colour)
    return Layout(kind.flatten(1), colour.flatten(1))


def scenes_and_captions(rng: random.Random, count: int) -> tuple[list[Scene], list[str]]:
    """Training scenes of all stages, each with one caption."""
    scenes = [sample_scene(rng, STAGES[rng.choice(_STAGES)]) for _ in range(count)]
    return scenes, [captions(scene, rng) for scene in scenes]


def right_cells(model: Grounded, stage: str, count: int = 200) -> tuple[float, float]:
    """Share of the object cells of held-out two-object scenes whose kind is right, and of the coloured ones whose colour is."""
    rng = random.Random(1)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng, STAGES[stage], held_out=True)
        if scene.relation not in (None, "and"):
            scenes.append(scene)
    truth = layout(scenes)
    with torch.no_grad():
        kind, colour = model([captions(scene, rng, loose=0) for scene in scenes])
    objects, coloured = truth.kind >= len(BACKGROUNDS), (truth.colour >= 0) & (truth.colour < UNCOLOURED)
    kinds_right = (kind.argmax(-1) == truth.kind)[objects].float().mean().item()
    return kinds_right, (colour.argmax(-1) == truth.colour)[coloured].float().mean().item()


def main() -> None:
    """Train, then write conditioner/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with text/, clip/ and t5/")
    parser.add_argument("--parent", type=Path, required=True, help="output of train_unet.py whose conditioner is trained on")
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="receives conditioner/")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = Grounded(options.text, options.parent)
    config = TrainConfig(steps=options.steps, lr=1e-3, warmup=100, cooldown=options.steps // 3, ema_decay=0.995, save_every=250, weight_decay=0.0)

    def loss_at(step: int) -> dict[str, Tensor]:
        scenes, said = scenes_and_captions(random.Random(f"{config.seed} {step}"), options.batch_size)
        truth, generator = layout(scenes), generator_for(config.seed, step)
        keep_clip, keep_t5 = (torch.rand(options.batch_size, generator=generator) >= share for share in (DROP_CLIP, DROP_T5))
        with torch.autocast("cpu", torch.bfloat16):
            kind, colour = model(said, keep_clip, keep_t5)
        weight = torch.where(truth.kind < len(BACKGROUNDS), BACKGROUND_WEIGHT, 1.0)
        kind_loss = (F.cross_entropy(kind.float().transpose(1, 2), truth.kind, reduction="none") * weight).sum() / weight.sum()
        colour_loss = F.cross_entropy(colour.float().transpose(1, 2), truth.colour, ignore_index=IGNORED)
        if step % 250 == 0:
            for stage in ("shapes", "stickers"):
                print(stage, "kind {:.0%}, colour {:.0%} of held-out pairs".format(*right_cells(model, stage)), flush=True)
        return {"loss": kind_loss + colour_loss, "kind": kind_loss.detach(), "colour": colour_loss.detach()}

    trained = train(model, loss_at, config, options.checkpoints, lambda line: print(line, flush=True))
    assert isinstance(trained, Grounded)
    for stage in ("shapes", "stickers"):
        print(stage, "kind {:.0%}, colour {:.0%} of held-out pairs, at the end".format(*right_cells(trained, stage)))
    folder = options.out / "conditioner"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in trained.conditioner.state_dict().items()}, folder / "diffusion_pytorch_model.safetensors"
    )
    shutil.copyfile(options.parent / "conditioner" / "config.json", folder / "config.json")


if __name__ == "__main__":
    main()
