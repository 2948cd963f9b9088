"""Memory and time of an SD-like U-Net and a T5 encoder of random weights, with and without `--quantize int8`.

    python scripts/bench_quantize.py --width 160 --dtype float32

Writes two networks (SD 1's U-Net at WIDTH of its 320 channels, a T5 encoder of 6 layers and 1024 channels) and loads them in a process for each kind,
as `generate` does. Prints what their weights take; resident memory beside files that are mapped ("anonymous"), before a network is loaded and once
passes were made; the peak of all memory; and the median time of a pass (U-Net: 32×32 latents, batch 2, 77 tokens; T5: 64 tokens).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from tu_diffuse.contracts import Conditioning
from tu_diffuse.pipeline.model.quantize import quantized
from tu_diffuse.text_encoders.t5 import T5Config, T5Encoder
from tu_diffuse.unet.config import UNetConfig
from tu_diffuse.unet.residency import load_expert
from tu_diffuse.unet.unet import UNet
from tu_diffuse.weights import load_weights, without_storage


def write(folder: Path, width: int) -> None:
    """Write both networks."""
    config = {"block_out_channels": [width, 2 * width, 4 * width, 4 * width], "cross_attention_dim": 768, "attention_head_dim": 8, "in_channels": 4}
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    t5 = {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 2816,
        "num_layers": 6,
        "num_heads": 16,
        "feed_forward_proj": "gated-gelu",
    }
    (folder / "t5").mkdir()
    (folder / "t5" / "config.json").write_text(json.dumps(t5))
    networks = {"unet": (UNet(UNetConfig.from_dict(config)), "diffusion_pytorch_model"), "t5": (T5Encoder(T5Config.from_dict(t5)), "model")}
    for name, (network, stem) in networks.items():
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / name / f"{stem}.safetensors")


def measure(folder: Path, network: str, kind: str, dtype: torch.dtype) -> dict[str, float]:
    """Load one network and pass through it."""
    torch.set_num_threads(1)
    quantized(torch.nn.Linear(32, 32), kind)  # imports torchao
    before = memory("RssAnon")
    if network == "unet":
        denoiser = load_expert(folder / "unet", "epsilon", lambda sigma: sigma, dtype)
        module = quantized(denoiser.unet, kind)
        told = Conditioning(torch.randn(2, 77, 768), None, None, None)
        x, sigma = torch.randn(2, 4, 32, 32), torch.tensor([5.0, 5.0])

        def run() -> object:
            return denoiser(x, sigma, told)
    else:
        config = T5Config.from_dict(json.loads((folder / "t5" / "config.json").read_text()))
        module = quantized(load_weights(without_storage(lambda: T5Encoder(config)), folder / "t5", "model", dtype), kind)
        ids = torch.randint(1000, (1, 64))

        def run() -> object:
            return module(ids, torch.ones_like(ids, dtype=torch.bool))

    times = list[float]()
    with torch.no_grad():
        for _ in range(4):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    held = sum(t.nbytes if not hasattr(t, "qdata") else t.qdata.nbytes + t.scale.nbytes for t in module.parameters())
    anonymous = {"before_mib": before, "after_mib": memory("RssAnon")}
    return {"weights_mib": held / 2**20, **anonymous, "peak_mib": memory("VmHWM"), "seconds": median(times[1:])}


def memory(name: str) -> float:
    """MiB, as Linux counts them."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return int(status[name].split()[0]) / 1024


def main() -> None:
    """Measure each kind in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--network", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(measure(options.folder, options.network, options.kind, getattr(torch, options.dtype))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.width)
        for network in ("unet", "t5"):
            for kind in ("none", "int8"):
                command = [sys.executable, __file__, "--folder", folder, "--network", network, "--kind", kind, "--dtype", options.dtype]
                facts = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
                print(f"{network:5} {kind:5}", "  ".join(f"{name} {value:.4g}" for name, value in facts.items()), flush=True)


if __name__ == "__main__":
    main()
