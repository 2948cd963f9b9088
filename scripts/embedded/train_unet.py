"""Train the U-Net of the embedded model, and its conditioner, on cached latents: first one network for all noise levels, then forks of it.

    python scripts/embedded/train_unet.py --text build --latents build/latents/shapes --checkpoints build/runs/unet --out build/unet --steps 6000
    python scripts/embedded/train_unet.py … --parent build/unet --t-min 500 --train-conditioner --out build/unet_high --steps 5000 --cooldown 2000 …
    python scripts/embedded/train_unet.py … --parent build/unet --t-max 500 --out build/unet_low --steps 5000 --cooldown 2000 …

A fork (`--parent`) starts from its parent's averaged weights and sees only its own timesteps, widened by a margin, since hard disjoint ranges are
fragile. All forks share one conditioner: the highest, which decides what is where, may go on training it (`--train-conditioner`); the others keep
it frozen and end on the final one (`--conditioner`). Run the same command again to resume. Every 500 steps it prints the text gap: the loss at a
high noise level with the right captions and with shuffled ones.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tu_diffuse.schedulers.noise import NoiseSchedule
from tu_diffuse.text_encoders.clip import CLIPText, CLIPTextConfig
from tu_diffuse.text_encoders.conditioner import Conditioner, ConditionerConfig
from tu_diffuse.text_encoders.t5 import T5Config, T5Encoder
from tu_diffuse.text_encoders.tokenizer import load_tokenizer
from tu_diffuse.training.loop import batch_indices, generator_for, train
from tu_diffuse.training.objective import ConditionedUNet, Draw, Objective, TextFeatures, denoising_loss, draw, shifted_cosine_betas, text_gap
from tu_diffuse.training.tallies import noise_bins
from tu_diffuse.training.train_config import TrainConfig
from tu_diffuse.training.workers import Workers, joined_workers
from tu_diffuse.unet.config import UNetConfig
from tu_diffuse.unet.unet import UNet
from tu_diffuse.weights import load_weights

WIDTH = 192  # of the joined text tokens
POOLED = 256
UNET = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [96, 160],
    "layers_per_block": [2, 1],
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    "use_linear_projection": True,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": POOLED,
}
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "trained_betas": shifted_cosine_betas(),
}
MARGIN = 50  # timesteps that a fork trains on beyond its border


@dataclass(frozen=True, eq=False)
class Captions:
    """Token ids of all captions, (n, longest) int64 with their masks."""

    clip_ids: Tensor
    clip_mask: Tensor
    t5_ids: Tensor
    t5_mask: Tensor


class TextEncoders(nn.Module):
    """The frozen pair."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        clip = CLIPTextConfig.from_dict(json.loads((folder / "clip" / "config.json").read_text()))
        t5 = T5Config.from_dict(json.loads((folder / "t5" / "config.json").read_text()))
        self.clip = load_weights(CLIPText(clip, projection=True), folder / "clip", stem="model")
        self.t5 = load_weights(T5Encoder(t5), folder / "t5", stem="model")
        self.widths = (clip.hidden_size, clip.projection_dim, t5.d_model)
        self.tokenizers = (load_tokenizer(folder / "text" / "tokenizer"), load_tokenizer(folder / "text" / "tokenizer_2"))

    def tokenize(self, captions: Sequence[str]) -> Captions:
        """Ids of all captions, cut to the longest."""
        parts: list[Tensor] = []
        for tokenizer in self.tokenizers:
            tokens = tokenizer.encode(captions)
            longest = int(tokens.mask.sum(1).max())
            parts += [tokens.ids[:, :longest], tokens.mask[:, :longest]]
        return Captions(*parts)

    @torch.no_grad()
    def features(self, captions: Captions, rows: Tensor) -> TextFeatures:
        """Encode the captions numbered `rows`, (batch,) int64."""
        clip_mask, t5_mask = captions.clip_mask[rows], captions.t5_mask[rows]
        clip_longest, t5_longest = int(clip_mask.sum(1).max()), int(t5_mask.sum(1).max())
        clip = self.clip(captions.clip_ids[rows, :clip_longest])
        t5_mask = t5_mask[:, :t5_longest]
        t5 = self.t5(captions.t5_ids[rows, :t5_longest], t5_mask)
        return TextFeatures(clip.last_hidden_state, clip_mask[:, :clip_longest], clip.projected, t5, t5_mask)


def new_model(widths: tuple[int, int, int]) -> ConditionedUNet:
    """The network with fresh weights: residual branches begin at zero."""
    unet = UNet(UNetConfig.from_dict(UNET))
    for name, parameter in unet.named_parameters():
        if name.endswith(("conv2.weight", "to_out.0.weight", "ff.net.2.weight", "conv_out.weight")):
            nn.init.zeros_(parameter)
    shape = ConditionerConfig(
        clip_width=widths[0], clip_pooled_width=widths[1], t5_width=widths[2], width=WIDTH, pooled_width=POOLED, refiner_layers=2
    )
    return ConditionedUNet(unet, Conditioner(shape))


def save_model(model: ConditionedUNet, out: Path) -> None:
    """Write `unet/`-style and `conditioner/` folders below `out`."""
    for name, part, config in (
        ("unet", model.unet, model.unet.config.to_dict()),
        ("conditioner", model.conditioner, model.conditioner.config.to_dict()),
    ):
        (out / name).mkdir(parents=True, exist_ok=True)
        weights = {key: tensor.contiguous() for key, tensor in part.state_dict().items()}
        save_file(weights, out / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        (out / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_data(folders: Sequence[Path]) -> tuple[Tensor, list[str]]:
    """Cached latents (n, 16, 8, 8) float16 and captions of several folders of encode_latents.py."""
    latents = torch.cat([load_file(folder / "latents.safetensors")["latents"] for folder in folders])
    captions: list[str] = [caption for folder in folders for caption in json.loads((folder / "captions.json").read_text())]
    return latents, captions


def main() -> None:
    """Train, then write the averaged weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with text/, clip/ and t5/")
    parser.add_argument("--latents", type=Path, nargs="+", required=True)
    parser.add_argument("--checkpoints", type=Path, required=True, help="checkpoints")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parent", type=Path, help="fork from this output")
    parser.add_argument("--conditioner", type=Path, help="output whose conditioner is taken; the parent's by default")
    parser.add_argument("--train-conditioner", action="store_true", help="let this fork go on training it")
    parser.add_argument("--t-min", type=int, default=0)
    parser.add_argument("--t-max", type=int, default=1000)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--cooldown", type=int, default=0, help="last steps over which the learning rate falls to zero")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema-decay", type=float, default=0.999, help="of the averaged weights; 0.99 suits a short fork")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    with joined_workers() as workers:
        train_network(options, workers)


def train_network(options: argparse.Namespace, workers: Workers) -> None:
    """This process's share of the training."""
    encoders = TextEncoders(options.text)
    latents, captions = load_data(options.latents)
    ids = encoders.tokenize(captions)
    model = new_model(encoders.widths)
    if options.parent is not None:
        for folder, name, part in (
            (options.parent, "unet", model.unet),
            (options.conditioner or options.parent, "conditioner", model.conditioner),
        ):
            part.load_state_dict(load_file(folder / name / "diffusion_pytorch_model.safetensors"))
        model.conditioner.requires_grad_(options.train_conditioner)
    sigmas = NoiseSchedule.from_config(SCHEDULER).sigmas
    interval = (max(0, options.t_min - MARGIN), min(1000, options.t_max + MARGIN))
    objective = Objective(sigmas=sigmas, t_min=interval[0], t_max=interval[1], told_apart=noise_bins(1000))
    config = TrainConfig(
        steps=options.steps, lr=options.lr, cooldown=options.cooldown, ema_decay=options.ema_decay, seed=options.seed, save_every=250
    )

    def predict(text: TextFeatures, x: Tensor, t: Tensor, drawn: Draw) -> Tensor:
        return model(x, t, text, drawn.keep_clip, drawn.keep_t5)

    def loss_at(step: int) -> dict[str, Tensor]:
        generator = generator_for(config.seed, step)
        drawn = draw(objective, (options.batch_size, *latents.shape[1:]), generator).rows(workers.rows)
        rows = batch_indices(len(latents), options.batch_size, config.seed, step)[workers.rows]
        with torch.autocast("cpu", torch.bfloat16):
            text = encoders.features(ids, rows)
            losses = denoising_loss(partial(predict, text), objective, latents[rows].float(), drawn)
        if (step + 1) % 500 == 0 and workers.writes:
            right, wrong = text_gap(model, objective, latents[rows].float(), text, 3 * objective.t_max // 4, generator)
            print(f"step {step + 1}: text gap {wrong:.4f} with shuffled captions against {right:.4f}", flush=True)
        return losses

    trained = train(model, loss_at, config, options.checkpoints, lambda line: print(line, flush=True), workers)
    if workers.writes:
        save_model(trained, options.out)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
