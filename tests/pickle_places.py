"""Where a pickle can lie among the files that commands read, by what it replaces."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safety_scenes import EMBEDDING, LORA, MODEL, PICTURE, PICTURES, SCORES, SHARDS, Commands, Scene, put
from shard_sets import members_of, tar_bytes

WEIGHTS = "diffusion_pytorch_model.safetensors"
SUFFIXES = ("bin", "ckpt", "pt", "pth", "pkl", "pickle", "joblib", "npy", "npz", "BIN")


@dataclass(frozen=True)
class Place:
    """A place for a pickle.

    Attributes:
        put: puts it into a scene.
        commands: those that read the place.
        refused: those that must refuse it; others may not come so far, or do without.
        harmless: nothing has to be refused, since nothing reads it: every command does its work.
    """

    put: Callable[[Scene, bytes], object]
    commands: Commands
    refused: tuple[str, ...] = ()
    harmless: bool = False


def _instead(scene: Scene, data: bytes, there: str, name: str) -> None:
    """In place of the file `there`, under another name."""
    path = scene.model / there
    path.unlink()
    put(path.with_name(name), data)


def _as(scene: Scene, data: bytes, there: str) -> None:
    put(scene.model / there, data)


def _index(scene: Scene, data: bytes, name: str) -> None:
    """Named by the index of the U-Net's weights."""
    (scene.model / "unet" / WEIGHTS).unlink()
    put(scene.model / "unet" / name, data)
    put(scene.model / "unet" / f"{WEIGHTS}.index.json", {"weight_map": {"conv_in.weight": name}})


def _whole_model(scene: Scene, data: bytes, name: str) -> None:
    """The model is a file, or a folder that holds one file."""
    scene.model.rename(scene.root / "elsewhere")
    put(scene.root / name, data)


def _beside(scene: Scene, data: bytes) -> None:
    """Beside the weights of every part, as many checkpoints on the hub have them; also what training programs leave there."""
    for folder in [scene.model, *(path for path in scene.model.iterdir() if path.is_dir())]:
        for stem in ("diffusion_pytorch_model", "pytorch_model", "optimizer", "random_states_0", "rng_state", "training_args"):
            if not (folder / "delta.json").exists() or stem != "diffusion_pytorch_model":
                for suffix in SUFFIXES[:7]:
                    put(folder / f"{stem}.{suffix}", data)


def _checkpoint(scene: Scene, data: bytes, name: str) -> None:
    """In a checkpoint of training whose manifest agrees."""
    folder = scene.tuned / "checkpoints" / "checkpoint-00000002"
    put(folder / name, data)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    put(folder / "manifest.json", manifest | {name: hashlib.sha256(data).hexdigest()})


def _snapshots(scene: Scene, data: bytes) -> None:
    for path in (scene.tuned / "checkpoints" / "averages").iterdir():
        put(path, data)


def _picture(scene: Scene, data: bytes, how: str) -> None:
    """In a picture: as the text of its settings, in a chunk of other programs, after its end."""
    path, told = scene.picture, PngInfo()
    with Image.open(path) as image:
        image.load()
        old, settings = image.convert("RGB"), image.info["tu-diffuse"]
    text = data.decode("latin-1").replace("\0", "")
    told.add_text("tu-diffuse", text if how == "settings" else settings)
    told.add_text("parameters", text)
    path.unlink()
    old.save(path, pnginfo=told, exif=b"Exif\0\0" + data[:60_000] if how == "exif" else b"")
    if how == "end":
        put(path, path.read_bytes() + data)


def _members(scene: Scene, data: bytes, suffixes: Iterable[str]) -> None:
    put(scene.shard, tar_bytes([*members_of(12), *((f"999.{suffix}", data) for suffix in suffixes)])[0])


def _encoded(scene: Scene, data: bytes) -> None:
    """Members of a shard of `shards encode`."""
    put(scene.shard, tar_bytes([("encoding.safetensors", data), ("000000000.safetensors", data), ("000000001.safetensors", data)])[0])


def _parked(scene: Scene, data: bytes) -> None:
    """As the draft of a batch that waits, whatever its name is."""
    for path in scene.pictures.glob("*.png"):
        path.unlink()
    put(scene.pictures / "journal.jsonl", "")
    for batch in json.loads((scene.pictures / "plan.json").read_bytes())["batches"]:
        name = hashlib.sha256(" ".join(item["key"] for item in batch).encode()).hexdigest()[:32]
        put(scene.pictures / f".parked-{name}.safetensors", data)


def _scores(scene: Scene, data: bytes, name: str) -> None:
    """In a CLIP pair that scores pictures."""
    shape = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16}, "text_cfg": {"width": 32, "layers": 1}}
    put(scene.root / "scores" / "open_clip_config.json", {"model_cfg": shape})
    put(scene.root / "scores" / name, data)


_PARTS = ("unet", "unet_low", "vae", "conditioner")
_JSON = (
    "model_index.json",
    "experts.json",
    "defaults.json",
    "unet/config.json",
    "unet_low/config.json",
    "vae/config.json",
    "conditioner/config.json",
)
_JSON += ("scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder_2/config.json", "unet_t0478-0796/delta.json")
_TOKENIZERS = ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json")
_TOKENIZERS += ("tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer_config.json")
_FILES: dict[str, Callable[[Scene], Path]] = {
    "the journal": lambda s: s.pictures / "journal.jsonl",
    "the plan": lambda s: s.pictures / "plan.json",
    "the summary": lambda s: s.pictures / "summary.json",
}

READERS = SHARDS | {name: MODEL[name] for name in ("finetune", "shards encode", "experts suggest-boundary")}
RESUMED = {"finetune, resumed": MODEL["finetune, resumed"]}

PLACES: dict[str, Place] = {
    "beside the weights of every part": Place(_beside, MODEL, harmless=True),
    **{
        f"{part}: only .{suffix}": Place(partial(_instead, there=f"{part}/{WEIGHTS}", name=f"diffusion_pytorch_model.{suffix}"), MODEL, ("generate",))
        for part, suffix in zip((*_PARTS, *_PARTS, "unet", "vae"), SUFFIXES, strict=True)
    },
    **{
        f"{part}: only pytorch_model.bin": Place(partial(_instead, there=f"{part}/model.safetensors", name="pytorch_model.bin"), MODEL, ("generate",))
        for part in ("text_encoder", "text_encoder_2")
    },
    **{f"{part}: renamed .safetensors": Place(partial(_as, there=f"{part}/{WEIGHTS}"), MODEL, ("generate",)) for part in _PARTS},
    **{
        f"{part}: renamed .safetensors": Place(partial(_as, there=f"{part}/model.safetensors"), MODEL, ("generate",))
        for part in ("text_encoder", "text_encoder_2")
    },
    "an expert's delta.safetensors": Place(partial(_as, there="unet_t0478-0796/delta.safetensors"), MODEL, ("generate",)),
    "an expert's LoRA": Place(partial(_as, there="unet_t0478-0796/pytorch_lora_weights.safetensors"), MODEL, ("generate",)),
    "an expert's delta: also .bin": Place(partial(_as, there="unet_t0478-0796/diffusion_pytorch_model.bin"), MODEL, ("generate",)),
    "named by an index": Place(partial(_index, name="diffusion_pytorch_model.bin"), MODEL, ("generate", "info", "experts show")),
    "named by an index, renamed": Place(partial(_index, name="part-1.safetensors"), MODEL, ("generate", "info", "experts show")),
    "the index itself": Place(lambda s, d: _instead(s, d, f"unet/{WEIGHTS}", f"{WEIGHTS}.index.json"), MODEL, ("generate",)),
    **{f"as {name}": Place(partial(_as, there=name), MODEL, ("generate", "info")) for name in _JSON},
    **{f"as {name}": Place(partial(_as, there=name), MODEL, ("generate",)) for name in _TOKENIZERS},
    "as tokenizer_2/spiece.model": Place(partial(_instead, there="tokenizer_2/tokenizer.json", name="spiece.model"), MODEL, ("generate",)),
    "the model is a pickle": Place(partial(_whole_model, name="model"), MODEL),
    **{
        f"the model is a single .{suffix}": Place(partial(_whole_model, name=f"model.{suffix}"), MODEL, ("generate", "info", "models convert"))
        for suffix in (*SUFFIXES, "safetensors")
    },
    "the model is a folder of a .ckpt": Place(partial(_whole_model, name="model/model.ckpt"), MODEL, ("generate", "info")),
    "the model is a folder of a renamed .safetensors": Place(partial(_whole_model, name="model/model.safetensors"), MODEL, ("generate", "info")),
    "the shard is a pickle": Place(lambda s, d: put(s.shard, d), READERS, ("shards check",)),
    "members named as pickles": Place(partial(_members, suffixes=(*SUFFIXES, "pyd", "jpg.pkl")), READERS, harmless=True),
    "members named as pictures, texts, JSON": Place(partial(_members, suffixes=("png", "jpg", "txt", "json")), READERS, ("shards check",)),
    "encoded members": Place(_encoded, READERS),
    "statistics beside a shard": Place(lambda s, d: put(s.root / "a_stats.json", d), READERS),
    **{
        f"a checkpoint's {name}": Place(partial(_checkpoint, name=name), RESUMED, ("finetune, resumed",))
        for name in ("model.safetensors", "average.safetensors", "optimizer.safetensors", "power_averages.safetensors", "state.json")
    },
    "a checkpoint's random states": Place(partial(_checkpoint, name="rng_state.pth"), RESUMED, harmless=True),
    "the manifest of a checkpoint": Place(lambda s, d: put(s.tuned / "checkpoints" / "checkpoint-00000002" / "manifest.json", d), RESUMED),
    "the log of losses": Place(lambda s, d: put(s.tuned / "checkpoints" / "losses.jsonl", d), RESUMED),
    "snapshots of averages": Place(_snapshots, {"average": MODEL["average"]}, ("average",)),
    "the picture is a pickle": Place(lambda s, d: put(s.picture, d), PICTURE, ("info", "replay")),
    "a picture's settings": Place(partial(_picture, how="settings"), PICTURE, ("info", "replay")),
    "a picture's EXIF": Place(partial(_picture, how="exif"), PICTURE, harmless=True),
    "after a picture's end": Place(partial(_picture, how="end"), PICTURE, harmless=True),
    "the prompt file": Place(lambda s, d: put(s.prompts, d), PICTURES),
    "a parked draft": Place(_parked, PICTURES, harmless=True),
    **{what: Place(lambda s, d, at=at: put(at(s), d), PICTURES) for what, at in _FILES.items()},
    **{
        f"a LoRA .{suffix}": Place(lambda s, d, suffix=suffix: put(s.root / f"adapter.{suffix}", d), LORA, ("generate --lora",))
        for suffix in SUFFIXES
    },
    "a LoRA, renamed": Place(lambda s, d: put(s.root / "adapter.safetensors", d), LORA, ("generate --lora",)),
    "a LoRA's folder": Place(lambda s, d: put(s.root / "adapter" / "adapter_model.bin", d), LORA),
    "a LoRA's folder, renamed": Place(lambda s, d: put(s.root / "adapter" / "adapter_model.safetensors", d), LORA, ("generate --lora",)),
    **{
        f"an embedding .{suffix}": Place(lambda s, d, suffix=suffix: put(s.root / f"adapter.{suffix}", d), EMBEDDING, ("generate --embedding",))
        for suffix in ("pt", "bin", "pkl")
    },
    "an embedding, renamed": Place(lambda s, d: put(s.root / "adapter.safetensors", d), EMBEDDING, ("generate --embedding",)),
    **{
        f"scores: {name}": Place(partial(_scores, name=name), SCORES)
        for name in ("open_clip_pytorch_model.bin", "open_clip_model.safetensors", "open_clip_config.json", "model.npz")
    },
}
