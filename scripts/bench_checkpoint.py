"""Time one picture of one checkpoint from shell to file, `tu-diffuse generate` against a script over diffusers' StableDiffusionPipeline.

    python scripts/bench_checkpoint.py --rounds 5

The checkpoint has Stable Diffusion 1's layout and text encoder and random weights; `--width 320` makes U-Net and VAE as wide as the published ones.
Both read the same folder with the same scheduler, steps, guidance and seed, in float32 on the CPU, each in a process of its own, in turn. Prints how
far the two pictures are apart, seconds, the ratio to ours in the same round with its range, and the highest resident memory.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ratios import report

PROMPT = "a red apple to the left of a blue star"
MAKE = """
import sys
from pathlib import Path
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from tu_diffuse.pipeline.model.folder import EMBEDDED

folder, width = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", model_max_length=77)
ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **sizes, **ends))
unet = UNet2DConditionModel(block_out_channels=(width, 2 * width, 4 * width, 4 * width), cross_attention_dim=768, attention_head_dim=8)
vae = AutoencoderKL(
    block_out_channels=(width * 2 // 5, width * 4 // 5, width * 8 // 5, width * 8 // 5),
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=16,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
)
scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)
parts = {"unet": unet, "vae": vae, "text_encoder": text, "tokenizer": tokenizer, "scheduler": scheduler}
StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
"""
THEIRS = """
import sys
import torch
from diffusers import StableDiffusionPipeline

model, prompt, side, steps, out = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(model, local_files_only=True)
pipeline.set_progress_bar_config(disable=True)
pipeline(
    prompt, width=int(side), height=int(side), num_inference_steps=int(steps), guidance_scale=7.5, generator=torch.Generator().manual_seed(1)
).images[0].save(out)
"""


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command: wall seconds, and its highest resident memory in MB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(said.decode())
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def apart(first: Path, second: Path) -> int:
    """The largest difference of two pictures, of 255."""
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(path).convert("RGB"), dtype=np.int16) for path in (first, second))
    if np.ptp(a) < 16:
        raise SystemExit(f"{first} is all of one colour, which proves nothing")
    return int(np.abs(a - b).max())


def main() -> None:
    """Make the checkpoint, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=160, help="channels of the U-Net's first level, a multiple of 160; Stable Diffusion 1 has 320")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model, ours, theirs = Path(work) / "model", Path(work) / "ours.png", Path(work) / "theirs.png"
        subprocess.run([sys.executable, "-c", MAKE, str(model), str(options.width)], check=True, capture_output=True)
        size = ["--width", str(options.side), "--height", str(options.side), "--steps", str(options.steps), "--guidance", "7.5", "--seed", "1"]
        commands = {
            "ours": ["tu-diffuse", "generate", PROMPT, "--model", str(model), *size, "--dtype", "float32", "--device", "cpu", "--out", str(ours)],
            "theirs": [sys.executable, "-c", THEIRS, str(model), PROMPT, str(options.side), str(options.steps), str(theirs)],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        memory, difference = dict.fromkeys(commands, 0.0), None
        for number in range(options.rounds + 1):
            for name in list(commands)[:: 1 if number % 2 else -1]:
                ours.unlink(missing_ok=True)  # a picture is never written over
                took, memory[name] = timed(commands[name])
                if number > 0:  # the first round warms the disk's cache
                    seconds[name].append(took)
            difference = apart(ours, theirs) if ours.exists() else difference
        print(f"largest difference of the pictures: {difference} of 255")
    report(seconds, memory)


if __name__ == "__main__":
    main()
