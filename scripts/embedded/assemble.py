"""Put the trained parts together as a model folder, weights in float16.

    python scripts/embedded/assemble.py --build build --experts unet_low:0:1.5 unet:1.5:inf --out models/embedded

Each expert is folder:sigma_min:sigma_max, from low to high noise. All weights together may take 40 MB.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from train_unet import SCHEDULER
from tu_diffuse.model_files import weights_sha256
from tu_diffuse.unet.experts import ExpertEntry, write_experts

LIMIT = 40_000_000  # bytes
INDEX = {
    "_class_name": "TuDiffusePipeline",
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
    "conditioner": ["tu_diffuse", "Conditioner"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderDC"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
}
DEFAULTS = {"width": 128, "height": 128, "steps": 20, "sampler": "dpmpp_2m", "schedule": "trailing", "guidance": 3.0}


def copy_part(source: Path, target: Path, stem: str = "diffusion_pytorch_model") -> None:
    """Copy config.json, and the weights as float16."""
    target.mkdir(parents=True)
    shutil.copyfile(source / "config.json", target / "config.json")
    weights = {
        name: tensor.to(torch.float16) if tensor.is_floating_point() else tensor for name, tensor in load_file(source / f"{stem}.safetensors").items()
    }
    save_file(weights, target / f"{stem}.safetensors", metadata={"format": "pt"})


def expert(text: str) -> tuple[Path, float, float]:
    """Parse folder:sigma_min:sigma_max."""
    folder, low, high = text.split(":")
    return Path(folder), float(low), float(high)


def main() -> None:
    """Assemble."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--experts", type=expert, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    build, out = options.build, options.out
    shutil.rmtree(out, ignore_errors=True)
    copy_part(build / "clip", out / "text_encoder", "model")
    copy_part(build / "t5", out / "text_encoder_2", "model")
    copy_part(build / "image_encoder", out / "image_encoder", "model")  # scores pictures, with the first text encoder
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(build / "text" / name, out / name)
    copy_part(build / "vae", out / "vae")
    highest = build / options.experts[-1][0]
    copy_part(highest / "conditioner", out / "conditioner")
    entries: list[ExpertEntry] = []
    names = ("low", "high") if len(options.experts) == 2 else tuple(f"expert-{i}" for i in range(len(options.experts)))
    for name, (folder, low, high) in zip(names, options.experts, strict=True):
        subfolder = "unet" if folder == options.experts[-1][0] else f"unet_{name}"
        copy_part(build / folder / "unet", out / subfolder)
        entries.append(ExpertEntry(name=name, subfolder=subfolder, sigma_min=low, sigma_max=high, sha256=weights_sha256(out / subfolder)))
    write_experts(out, entries)
    (out / "scheduler").mkdir()
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER) + "\n")
    (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    (out / "defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    print(f"{out}: {size / 1e6:.2f} MB of weights, at most {LIMIT / 1e6:.0f} wanted")
    if size > LIMIT:
        raise SystemExit("The weights are too large to ship.")


if __name__ == "__main__":
    main()
