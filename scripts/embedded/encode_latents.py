"""Encode the pictures of LAION-style shards to latents, once, for the training of the U-Net.

    python scripts/embedded/encode_latents.py --vae build/vae --shards build/shards/shapes --out build/latents/shapes

Writes latents.safetensors (n, 16, 8, 8) float16, standardised with the `latents_mean` and `latents_std` of the VAE's config, and captions.json.
With --measure these two are measured on the pictures and written into the config first. About 100 pictures a second on one core.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tu_diffuse.shards.index import load_shards
from tu_diffuse.vae.autoencoder_dc import AutoencoderDC, AutoencoderDCConfig
from tu_diffuse.weights import load_weights


def main() -> None:
    """Encode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="folder with config.json and weights")
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measure", action="store_true", help="write the mean and deviation of these latents into the VAE's config")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = json.loads((options.vae / "config.json").read_text())
    vae = AutoencoderDC(AutoencoderDCConfig.from_dict(config))
    load_weights(vae, options.vae)
    latents: list[torch.Tensor] = []
    captions: list[str] = []
    for shard in sorted(options.shards.glob("*.tar")):
        pictures, said, _ = load_shards([shard])
        captions += said
        for chunk in np.array_split(pictures, max(1, len(pictures) // 50)):
            pixels = torch.from_numpy(chunk).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.inference_mode():
                latents.append(vae.encode(pixels.contiguous(memory_format=torch.channels_last))[0])
        print(f"{shard.name}: {len(captions)} pictures encoded", flush=True)
    joined = torch.cat(latents)
    if options.measure:
        config["latents_mean"] = [round(value, 5) for value in joined.mean(dim=(0, 2, 3)).tolist()]
        config["latents_std"] = [round(value, 5) for value in joined.std(dim=(0, 2, 3)).tolist()]
        (options.vae / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    mean, std = (torch.tensor(config[name])[None, :, None, None] for name in ("latents_mean", "latents_std"))
    options.out.mkdir(parents=True, exist_ok=True)
    save_file({"latents": ((joined - mean) / std).half().contiguous()}, options.out / "latents.safetensors")
    (options.out / "captions.json").write_text(json.dumps(captions))


if __name__ == "__main__":
    main()
