"""Memory and time of `generate` with and without `--offload`, on a model of random weights in float16 that computes in float32.

    python scripts/bench_offload.py --width 160

Writes a model folder like Stable Diffusion 1's: its text encoder and VAE, and its U-Net at WIDTH of 320 channels. Each way is a process of its own on
one core, which draws one picture. Prints what all weights take as they are computed with; the peak of resident memory beside files that are
mapped ("anonymous", sampled every 5 ms), which cannot be dropped; its value before the model is loaded; and the seconds from there on.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from tu_diffuse.text_encoders.clip import CLIPText, CLIPTextConfig
from tu_diffuse.text_encoders.clip_vocabulary import clip_merges, clip_words
from tu_diffuse.unet.config import UNetConfig
from tu_diffuse.unet.unet import UNet
from tu_diffuse.vae.autoencoder import Autoencoder
from tu_diffuse.vae.config import AutoencoderConfig

TEXT = {"model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
TEXT |= {"num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu", "eos_token_id": 2}
TEXT |= {"bos_token_id": 0}
VAE = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "scaling_factor": 0.18215}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "in_channels": 3, "out_channels": 3}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1}
PARTS = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
}


def write(folder: Path, width: int) -> None:
    """Write the model folder."""
    unet = {"block_out_channels": [width, 2 * width, 4 * width, 4 * width], "cross_attention_dim": 768, "attention_head_dim": 8, "in_channels": 4}
    networks: dict[str, tuple[nn.Module, Mapping[str, object]]] = {
        "unet": (UNet(UNetConfig.from_dict(unet)), unet),
        "vae": (Autoencoder(AutoencoderConfig.from_dict(VAE)), VAE),
        "text_encoder": (CLIPText(CLIPTextConfig.from_dict(TEXT), projection=False), TEXT),
    }
    documents: dict[str, object] = {"model_index.json": {"_class_name": "StableDiffusionPipeline", **PARTS}, "scheduler/scheduler_config.json": NOISE}
    documents |= {f"{name}/config.json": config for name, (_, config) in networks.items()}
    merges = clip_merges()
    documents["tokenizer/vocab.json"] = clip_words(merges, "<|startoftext|>", "<|endoftext|>")
    documents["tokenizer/tokenizer_config.json"] = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    for name, content in documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    for name, (network, _) in networks.items():
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        tensors = {key: value.detach().half().contiguous() for key, value in network.state_dict().items()}
        save_file(tensors, folder / name / f"{stem}.safetensors")


def measure(folder: Path, way: str, size: int, steps: int) -> dict[str, object]:
    """Draw one picture in this process."""
    torch.set_num_threads(1)
    from tu_diffuse.cli.main import run

    peak, done = [memory("RssAnon")], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak.append(memory("RssAnon"))

    picture = folder.parent / f"{way}.png"
    arguments = ["generate", "a red apple", "--model", str(folder), "--seed", "1", "--steps", str(steps), "--width", str(size), "--height", str(size)]
    arguments += ["--dtype", "float32", "--device", "cpu", "--out", str(picture), *(["--offload"] if way == "offload" else [])]
    watcher = threading.Thread(target=sample)
    watcher.start()
    started = time.perf_counter()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as said:
        code = run(arguments)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if code != 0:
        raise SystemExit(said.getvalue())
    digest = hashlib.sha256(picture.read_bytes()).hexdigest()[:12]
    return {"before_mib": round(peak[0]), "peak_mib": round(max(peak)), "seconds": round(seconds, 1), "file": digest}


def memory(name: str) -> float:
    """MiB, as Linux counts them."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return int(status[name].split()[0]) / 1024


def main() -> None:
    """Measure each way in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(measure(options.folder, options.way, options.size, options.steps)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write(folder, options.width)
        stored = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**20
        print(f"weights: {stored:.0f} MiB on disk, {2 * stored:.0f} MiB in float32")
        for way in ("none", "offload"):
            command = [sys.executable, __file__, "--folder", str(folder), "--way", way, "--size", str(options.size), "--steps", str(options.steps)]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(f"{way:8}", result.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
