"""Model folders that bring code, ask for it, or name files outside themselves: name -> what makes a good model folder into one."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safety_scenes import put

Change = Callable[[Path], object]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def canary_code(folder: Path) -> str:
    """Python that leaves a file beside the model folder when it is imported."""
    return f"open({str(folder.parent / 'canary')!r}, 'w').close()\nclass Evil:\n    pass\n"


def _code(folder: Path, name: str) -> None:
    put(folder / name, canary_code(folder))


def change_json(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_bytes())
    change(content)
    put(folder / name, content)


def _set(folder: Path, name: str, **values: Any) -> None:
    change_json(folder, name, lambda content: content.update(values))


def _link(folder: Path, name: str, target: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _moved(folder: Path, name: str) -> None:
    """A part lies outside and a link leads to it."""
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to("../elsewhere")


def _index_outside(folder: Path) -> None:
    (folder / "model_index.json").rename(folder.parent / "model_index.json")
    _link(folder, "model_index.json", "../model_index.json")


def _files() -> dict[str, Change]:
    names = (
        "pipeline.py",
        "unet/modeling.py",
        "scheduler/my_scheduler.py",
        "vae/__init__.py",
        "tokenizer/tok.pyc",
        "unet/fast.so",
        "a.cpython-311.so",
    )
    names += ("deep/er/hook.py", "unet/ext.PYD", "x.dylib", "vae/y.dll", "lib.so.1", "conditioner/conditioner.pyx")
    names += ("sitecustomize.py",)
    return {f"file {name}": partial(_code, name=name) for name in names}


def _links() -> dict[str, Change]:
    return {
        "link: config.json to a file of the system": partial(_link, name="vae/config.json", target="/etc/passwd"),
        "link: weights outside": partial(_link, name=f"vae/{WEIGHTS}", target="../../a.tar"),
        "link: an unused file outside": partial(_link, name="LICENSE", target="/etc/hostname"),
        "link: a part outside": partial(_moved, name="vae"),
        "link: an expert outside": partial(_moved, name="unet_low"),
        "link: to nothing outside": partial(_link, name="notes.txt", target="/nowhere/at/all"),
        "link: to a device": partial(_link, name="tokenizer/vocab.json", target="/dev/zero"),
        "link: the index of the model": _index_outside,
    }


def _index() -> dict[str, Change]:
    asked = {
        "a pipeline of the hub": {"_class_name": "EvilPipeline"},
        "a pipeline in a file": {"_class_name": ["pipeline", "Evil"]},
        "no pipeline": {"_class_name": None},
        "custom_pipeline": {"custom_pipeline": "evil/repo"},
        "custom_pipelines": {"custom_pipelines": {"x": {"impl": "pipeline.Evil", "pt": ["Evil"]}}},
        "auto_map": {"auto_map": {"AutoModel": "modeling.Evil"}},
        "trust_remote_code": {"trust_remote_code": True},
        "a class of ours to be": {"unet": ["unet.modeling", "Evil"]},
        "a class of the standard library": {"unet": ["subprocess", "Popen"]},
        "os.system": {"scheduler": ["os", "system"]},
        "builtins.eval": {"tokenizer": ["builtins", "eval"]},
        "a private module": {"vae": ["diffusers.utils.dynamic_modules_utils", "get_class_from_dynamic_module"]},
        "another class of diffusers": {"vae": ["diffusers", "ConfigMixin"]},
        "another class of transformers": {"text_encoder": ["transformers", "AutoModel"]},
        "three entries": {"unet": ["diffusers", "UNet2DConditionModel", "evil"]},
        "numbers": {"unet": [1, 2]},
        "a nested list": {"unet": [["diffusers"], "UNet2DConditionModel"]},
        "an unknown part": {"helper": ["helper", "Evil"]},
        "a part above the folder": {"..": ["diffusers", "AutoencoderKL"]},
        "a part elsewhere": {"../elsewhere": ["diffusers", "AutoencoderKL"]},
        "an absolute part": {"/etc": ["diffusers", "AutoencoderKL"]},
    }
    return {f"model_index: {name}": partial(_set, name="model_index.json", **values) for name, values in asked.items()}


def _configs() -> dict[str, Change]:
    asked: list[tuple[str, dict[str, Any]]] = [
        ("unet/config.json", {"_class_name": "Evil"}),
        ("unet/config.json", {"_class_name": ["modeling", "Evil"]}),
        ("unet/config.json", {"auto_map": {"AutoModel": "modeling.Evil"}}),
        ("unet_low/config.json", {"_class_name": "os.system"}),
        ("vae/config.json", {"_class_name": "Evil"}),
        ("vae/config.json", {"custom_pipelines": {}}),
        ("scheduler/scheduler_config.json", {"_class_name": "EvilScheduler"}),
        ("scheduler/scheduler_config.json", {"_class_name": ["my_scheduler", "Evil"]}),
        ("text_encoder/config.json", {"architectures": ["EvilModel"]}),
        ("text_encoder/config.json", {"architectures": ["CLIPTextModel", "EvilModel"]}),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil/repo--modeling.Evil"}}),
        ("text_encoder/config.json", {"text_config": {"auto_map": {"AutoConfig": "x.Y"}}}),
        ("text_encoder/config.json", {"trust_remote_code": True}),
        ("text_encoder_2/config.json", {"architectures": "EvilModel"}),
        ("text_encoder_2/config.json", {"deep": [{"er": {"trust_remote_code": True}}]}),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tok.Evil", None]}}),
        ("tokenizer/tokenizer_config.json", {"added": {"auto_map": {}}}),
        ("tokenizer_2/tokenizer_config.json", {"tokenizer_class": ["tok", "Evil"]}),
        ("conditioner/config.json", {"_class_name": "Evil"}),
        ("conditioner/config.json", {"custom_pipeline": "evil"}),
    ]
    found = {f"{name}: {json.dumps(values)}": partial(_set, name=name, **values) for name, values in asked}
    found["config.json beside model_index.json: auto_map"] = lambda folder: put(folder / "config.json", {"auto_map": {"AutoModel": "x.Y"}})
    found["a processor that is not loaded: auto_map"] = lambda folder: put(
        folder / "feature_extractor" / "preprocessor_config.json", {"auto_map": {}}
    )
    return found


CODE: dict[str, Change] = _files() | _links() | _index() | _configs()
"""Refused with exit code 3 before anything is loaded."""

NAMES = (
    "../a.tar",
    "../../etc/passwd",
    "/etc/passwd",
    "unet/../../a.tar",
    "..",
    ".",
    "",
    "..\\a.tar",
    "C:\\a.tar",
    "C:a.tar",
    "\\\\host\\share\\a",
    "a\0b",
)
NAMES += ("//etc/passwd", "./../a.tar", "a/../../b", "file:///etc/passwd", 5, None, ["x"], {"x": 1}, True)
"""Names that lead out of a folder, or are none."""


def _weight_map(folder: Path, part: str, stem: str, name: Any) -> None:
    (folder / part / f"{stem}.safetensors").unlink()
    put(folder / part / f"{stem}.safetensors.index.json", {"weight_map": {"weight": name}})


def _expert(folder: Path, field: str, name: Any) -> None:
    change_json(folder, "experts.json", lambda content: content["experts"][0].update({field: name}))


def _text(folder: Path, name: Any) -> None:
    parts = {"text_encoder": "text_encoder", "tokenizer": name}
    _expert(folder, "text", {"family": "sd", "parts": parts, "zero_negative": False})


def _named() -> dict[str, Change]:
    places: dict[str, Callable[..., object]] = {
        "the index of unet": partial(_weight_map, part="unet", stem="diffusion_pytorch_model"),
        "the index of text_encoder": partial(_weight_map, part="text_encoder", stem="model"),
        "an expert's subfolder": partial(_expert, field="subfolder"),
        "an expert's parent": partial(_expert, field="parent"),
        "an expert's tokenizer": _text,
        "the base of a delta": lambda folder, name: _set(folder, next(path.name for path in folder.glob("unet_t*")) + "/delta.json", base=name),
    }
    return {
        f"{place}: {name!r}": partial(change, name=name)
        for place, change in places.items()
        for name in NAMES
        if not (place == "an expert's parent" and name is None)  # it has none
    }


NAMED: dict[str, Change] = _named()
"""Refused with exit code 3 or 4; what is named is never opened."""


def hub_cache(folder: Path) -> Path:
    """Make a model folder as the hub's cache keeps one: links to files in `blobs` beside the snapshots."""
    repository = folder.parent / "models--someone--model"
    snapshot, blobs = repository / "snapshots" / ("a" * 40), repository / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        target = snapshot / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / f"{number:040x}")
        target.symlink_to(os.path.relpath(blobs / f"{number:040x}", target.parent))
    return snapshot
