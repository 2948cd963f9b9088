"""Which files of a repository are fetched, from listings as the hub has them."""

import pytest
from tu_diffuse.errors import ModelError, UnsafeError, UsageError
from tu_diffuse.pipeline.hub.choice import choose

SD_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
SD15_LISTING = """
    .gitattributes README.md model_index.json v1-5-pruned.ckpt v1-5-pruned.safetensors v1-5-pruned-emaonly.ckpt v1-5-pruned-emaonly.safetensors
    v1-inference.yaml feature_extractor/preprocessor_config.json safety_checker/config.json safety_checker/model.safetensors
    safety_checker/model.fp16.safetensors safety_checker/pytorch_model.bin scheduler/scheduler_config.json text_encoder/config.json
    text_encoder/model.fp16.safetensors text_encoder/model.safetensors text_encoder/pytorch_model.bin text_encoder/pytorch_model.fp16.bin
    tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json tokenizer/vocab.json unet/config.json
    unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.fp16.bin unet/diffusion_pytorch_model.fp16.safetensors
    unet/diffusion_pytorch_model.non_ema.bin unet/diffusion_pytorch_model.non_ema.safetensors unet/diffusion_pytorch_model.safetensors
    vae/config.json vae/diffusion_pytorch_model.bin vae/diffusion_pytorch_model.fp16.bin vae/diffusion_pytorch_model.fp16.safetensors
    vae/diffusion_pytorch_model.safetensors
"""
TEXTS_LISTING = """
    README.md scheduler/scheduler_config.json text_encoder/config.json tokenizer/merges.txt tokenizer/special_tokens_map.json
    tokenizer/tokenizer_config.json tokenizer/vocab.json unet/config.json vae/config.json
"""
SD15, TEXTS = SD15_LISTING.split(), TEXTS_LISTING.split()


def test_a_model_folder_gets_each_weight_once():
    plain = ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    assert choose(SD15, SD_PARTS) == [*TEXTS, *plain, "model_index.json"]
    half = [name.replace(".safetensors", ".fp16.safetensors") for name in plain]
    assert choose(SD15, SD_PARTS, "fp16") == [*TEXTS, *half, "model_index.json"]
    without_plain = [name for name in SD15 if name not in plain and "non_ema" not in name]
    assert choose(without_plain, SD_PARTS) == [*TEXTS, *half, "model_index.json"]
    with pytest.raises(UsageError, match="variant 'int3'"):
        choose(SD15, SD_PARTS, "int3")
    with pytest.raises(UsageError, match=r"unet are there as fp16, non_ema; choose with --variant"):
        choose([name for name in SD15 if name not in plain], SD_PARTS)


@pytest.mark.parametrize(
    ("index", "shards", "variant"),
    [
        ("{stem}.safetensors.index.json", "{stem}-00001-of-00002.safetensors {stem}-00002-of-00002.safetensors", None),
        ("{stem}.safetensors.index.fp16.json", "{stem}.fp16-00001-of-00002.safetensors {stem}.fp16-00002-of-00002.safetensors", "fp16"),
        ("{stem}.fp16.safetensors.index.json", "{stem}-00001-of-00002.fp16.safetensors {stem}-00002-of-00002.fp16.safetensors", "fp16"),
    ],
)
def test_shards_come_with_their_index(index: str, shards: str, variant: str | None):
    stem = "unet/diffusion_pytorch_model"
    files = [index.format(stem=stem), *shards.format(stem=stem).split()]
    others = ["unet/config.json", f"{stem}.safetensors.index.bf16.json", f"{stem}.bf16-00001-of-00001.safetensors", "model_index.json"]
    assert set(choose([*others, *files], ["unet"], variant)) == {"unet/config.json", *files, "model_index.json"}
    with pytest.raises(ModelError, match="without an index"):
        choose([*others, *files[1:]], ["unet"], variant)


def test_an_ensemble_gets_all_experts_and_bases_of_deltas():
    names = ["model_index.json", "experts.json", "defaults.json", "other.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    names += ["unet_low/delta.json", "unet_low/delta.safetensors", "unet_low/pytorch_lora_weights.safetensors", "unet_x/config.json"]
    names += ["unet_x/diffusion_pytorch_model.safetensors", "unet_x/diffusion_pytorch_model.fp16.safetensors", "code/x.py"]
    wanted = set(names) - {"other.safetensors", "unet_x/diffusion_pytorch_model.fp16.safetensors", "code/x.py"}
    assert set(choose(names, ["unet"])) == wanted


def test_repositories_of_one_network_and_of_one_file():
    t5 = ["README.md", "config.json", "generation_config.json", "spiece.model", "tokenizer_config.json", "pytorch_model.bin", "tf_model.h5"]
    t5 += ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "onnx/model.onnx"]
    assert set(choose(t5, None)) == set(t5) - {"pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"}
    clip = ["open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "vocab.json", "merges.txt"]
    assert set(choose(clip, None)) == set(clip) - {"open_clip_pytorch_model.bin"}
    assert choose(["README.md", "cats.safetensors", "cats.png"], None) == ["README.md", "cats.safetensors"]
    with pytest.raises(UsageError, match=r"choose with --file one of a\.safetensors, b\.safetensors"):
        choose(["a.safetensors", "b.safetensors"], None)
    assert choose(SD15, SD_PARTS, only=["v1-5-pruned.safetensors"]) == ["v1-5-pruned.safetensors"]
    with pytest.raises(UsageError, match=r"no file 'c\.safetensors'"):
        choose(["a.safetensors", "b.safetensors"], None, only=["c.safetensors"])


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ([name for name in SD15 if not name.endswith(".safetensors")], SD_PARTS),
        ([name for name in SD15 if not name.startswith("vae/") or not name.endswith(".safetensors")], SD_PARTS),
        (["config.json", "pytorch_model.bin"], None),
        (["model.ckpt"], None),
        (["a.pt", "README.md"], None),
    ],
)
def test_pickles_are_refused(names: list[str], parts: tuple[str, ...] | None):
    with pytest.raises(UnsafeError, match="only as pickles"):
        choose(names, parts)


@pytest.mark.parametrize("name", ["v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin", "x.pt", "x.pth", "x.pkl", "pipeline.py"])
def test_pickles_and_code_are_not_fetched_by_name(name: str):
    with pytest.raises(UnsafeError, match="can run code"):
        choose([*SD15, name], SD_PARTS, only=[name])


def test_nothing_to_load():
    with pytest.raises(ModelError, match="no weights"):
        choose(["README.md", "x.gguf"], None)
