"""Train the latent codec of the embedded model: 128×128 pictures to 8×8×16 latents.

    python scripts/embedded/train_vae.py --out build/vae --checkpoints build/runs/vae

A deep-compression autoencoder (Chen et al. 2024) trained as a VAE whose posterior has the fixed deviation 0.1:
loss = |x − x̂| + 2·(x − x̂)² + 0.002·μ²/2.
It sees 64×64 crops around the objects of a third each of the three stages of the world, so that it knows stickers that the U-Net learns later.
encode_latents.py --measure then writes the latents' mean and deviation into its config. Run the same command again to resume.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tu_diffuse.training.loop import batch_indices, generator_for, train
from tu_diffuse.training.train_config import TrainConfig
from tu_diffuse.vae.autoencoder_dc import AutoencoderDC, AutoencoderDCConfig
from world import SIDE, STAGES, render, sample_scene

POSTERIOR_DEVIATION = 0.1
CROP = 64
SHIFT = 28  # px; how far an object may be from the middle of its crop
SHAPE = {
    "_class_name": "AutoencoderDC",
    "in_channels": 3,
    "latent_channels": 16,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [24, 24, 48, 96, 96],
    "decoder_block_out_channels": [24, 24, 48, 96, 96],
    "encoder_layers_per_block": [0, 1, 1, 1, 2],
    "decoder_layers_per_block": [0, 2, 2, 2, 2],
    "encoder_qkv_multiscales": [[], [], [], [], []],
    "decoder_qkv_multiscales": [[], [], [], [], []],
    "downsample_block_type": "pixel_unshuffle",
    "upsample_block_type": "pixel_shuffle",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 1.0,
}


def pictures(count: int, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int16]]:
    """`count` pictures (count, 128, 128, 3) and the centre (x, y) of one object of each."""
    rng = random.Random(seed)
    drawn = np.empty((count, SIDE, SIDE, 3), np.uint8)
    centres = np.empty((count, 2), np.int16)
    for i in range(count):
        scene = sample_scene(rng, STAGES[("shapes", "stickers", "full")[i % 3]])
        thing = rng.choice(scene.objects)
        drawn[i], centres[i] = render(scene), (thing.x, thing.y)
    return drawn, centres


def crops(drawn: npt.NDArray[np.uint8], centres: npt.NDArray[np.int16], rows: Tensor, generator: torch.Generator) -> Tensor:
    """Crops (batch, 3, 64, 64) in [-1, 1] around the objects of the pictures numbered `rows`."""
    shifts = torch.randint(-SHIFT, SHIFT + 1, (len(rows), 2), generator=generator).numpy()
    corners = np.clip(centres[rows.numpy()] + shifts - CROP // 2, 0, SIDE - CROP)
    cut = np.stack([drawn[i, y : y + CROP, x : x + CROP] for i, (x, y) in zip(rows.tolist(), corners.tolist(), strict=True)])
    return torch.from_numpy(cut).permute(0, 3, 1, 2).float() / 127.5 - 1


def main() -> None:
    """Train, then write config.json and weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True, help="checkpoints")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=24_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = AutoencoderDCConfig.from_dict(SHAPE)
    vae = AutoencoderDC(shape).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    drawn, centres = pictures(options.pictures, seed=123)
    config = TrainConfig(steps=options.steps, lr=1.5e-3, warmup=100, cooldown=options.steps * 11 // 26, ema_decay=0.995, save_every=250, seed=1)

    def loss_at(step: int) -> dict[str, Tensor]:
        generator = generator_for(config.seed, step)
        x = crops(drawn, centres, batch_indices(len(drawn), options.batch_size, config.seed, step), generator)
        mean, _ = vae.encode(x)
        decoded = vae.decode(mean + POSTERIOR_DEVIATION * torch.randn(mean.shape, generator=generator))
        squared, size = F.mse_loss(decoded, x), mean.square().mean()
        loss = F.l1_loss(decoded, x) + 2 * squared + 0.002 * size / 2
        return {"loss": loss, "squared": squared.detach(), "latent_size": size.detach()}

    trained = train(vae, loss_at, config, options.checkpoints, lambda line: print(line, flush=True))
    options.out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in trained.state_dict().items()}, options.out / "diffusion_pytorch_model.safetensors")
    (options.out / "config.json").write_text(json.dumps(shape.to_dict(), indent=2) + "\n")


if __name__ == "__main__":
    main()
