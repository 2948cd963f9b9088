"""Whole runs with LoRAs and embeddings: diffusers' latents, hot swap that leaves no trace, experts, prompt files, replay."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import LINEAR, kohya_names, pipeline_of, write_diffusers, write_kohya
from safetensors.torch import save_file
from torch import Tensor
from tu_diffuse.cli.main import run
from tu_diffuse.errors import ModelError, UsageError
from tu_diffuse.pipeline.adapters.adapters import Shelf, baked
from tu_diffuse.pipeline.adapters.lora_fit import networks_of
from tu_diffuse.pipeline.metadata import read_metadata
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import Model, adapted_to, load_model
from tu_diffuse.pipeline.request import Request
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Picture, Progress, text_to_image
from tu_diffuse.text_encoders.prompts import Reading, Text

PROMPT, STEPS = "a red apple", 4


def asked(shelf: Shelf, *loras: str, prompt: str = PROMPT, embeddings: tuple[str, ...] = (), **settings: Any) -> Request:
    given: dict[str, Any] = {"steps": STEPS, "sampler": "euler", "schedule": "leading", "guidance": 4.0} | settings
    return resolve(shelf.folder, prompt, [11], loras=map(shelf.lora, loras), embeddings=map(shelf.embedding, embeddings), **given)


def drawn(model: Model, shelf: Shelf, request: Request) -> tuple[Tensor, Tensor]:
    """The last step's clean latents, and the pixels."""
    events = list(text_to_image(adapted_to(model, shelf, request), request))
    return [event.x0 for event in events if isinstance(event, Progress)][-1], next(event.pixels for event in events if isinstance(event, Picture))


def theirs(pipeline: Any, prompt: str = PROMPT) -> Tensor:
    from diffusers import EulerDiscreteScheduler

    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    generator = torch.Generator().manual_seed(11)
    return pipeline(prompt, num_inference_steps=STEPS, guidance_scale=4.0, generator=generator, output_type="latent").images


@pytest.mark.parametrize("fixture", ["sd1_folder", "sd2_folder", "sdxl_folder"])
def test_latents_with_two_loras_equal_those_of_diffusers(request: pytest.FixtureRequest, fixture: str, tmp_path: Path):
    """U-Net and text encoders, with weights; the second is taken away in part. Where Euler ends, its last prediction is the result."""
    folder = request.getfixturevalue(fixture)
    first = write_diffusers(tmp_path / "first.safetensors", folder)
    second = (
        write_diffusers(tmp_path / "second.safetensors", folder, seed=2, targets=LINEAR, alpha=2)
        if fixture == "sdxl_folder"
        else write_kohya(tmp_path / "second.safetensors", kohya_names(folder), seed=2)
    )
    pipeline = pipeline_of(folder)
    plain = theirs(pipeline)
    for path in (first, second):
        pipeline.load_lora_weights(tmp_path, weight_name=path.name, adapter_name=path.stem)
    pipeline.set_adapters(["first", "second"], [0.3, -0.2])
    shelf = Shelf(open_folder(folder))
    latents, _ = drawn(load_model(shelf.folder, dtype="float32", device="cpu"), shelf, asked(shelf, f"{first}:0.3", f"{second}:-0.2"))
    wanted = theirs(pipeline)
    difference = float((latents - wanted).abs().max())
    print(f"{fixture} with two LoRAs: {difference:.1e} of {float(wanted.abs().max()):.1f}; they change {float((wanted - plain).abs().max()):.1e}")
    assert (wanted - plain).abs().max() > 1e-2
    assert difference <= 1e-4


def test_hot_swap_leaves_no_trace(sd1_folder: Path, tmp_path: Path):
    shelf = Shelf(open_folder(sd1_folder))
    model = load_model(shelf.folder, dtype="float32", device="cpu")
    a, b = (write_kohya(tmp_path / f"{seed}.safetensors", kohya_names(sd1_folder), seed=seed) for seed in (1, 2))
    before = drawn(model, shelf, asked(shelf))
    base = model.experts.get("unet").unet
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in base.state_dict().items()}
    with_a = drawn(model, shelf, asked(shelf, str(a)))
    with_b = drawn(model, shelf, asked(shelf, f"{b}:0.5"))
    assert all((one[0] - other[0]).abs().max() > 1e-2 for one, other in ((with_a, before), (with_b, before), (with_a, with_b)))
    for again, wanted in ((asked(shelf, str(a)), with_a), (asked(shelf), before), (asked(shelf, f"{a}:0", f"{b}:-0"), before)):
        assert all(map(torch.equal, drawn(model, shelf, again), wanted))
    assert model.experts.get("unet").unet is base
    assert all(tensor.data_ptr() == state[name][0] and torch.equal(tensor, state[name][1]) for name, tensor in base.state_dict().items())
    assert model.experts.loads["unet"] == 1


def test_what_a_lora_leaves_alone_is_shared(sd1_folder: Path, tmp_path: Path):
    path = write_diffusers(tmp_path / "a.safetensors", sd1_folder, targets=["to_q"], text=False)
    shelf = Shelf(open_folder(sd1_folder))
    model = load_model(shelf.folder, dtype="float16", device="cpu")
    own = model.experts.get("unet").unet.state_dict()
    adapted = model.experts.get_adapted("unet", shelf.adapters((shelf.lora(str(path)),)).change("unet").unet).unet.state_dict()
    changed = {name for name, tensor in adapted.items() if tensor.data_ptr() != own[name].data_ptr()}
    assert changed == {name for name in own if name.endswith("to_q.weight")}
    assert {tensor.dtype for tensor in adapted.values()} == {torch.float16}


def test_the_request_and_the_model_must_agree(sd1_folder: Path, tmp_path: Path):
    shelf = Shelf(open_folder(sd1_folder))
    path = write_kohya(tmp_path / "a.safetensors", kohya_names(sd1_folder))
    with pytest.raises(ValueError, match="other LoRAs"):
        next(text_to_image(load_model(shelf.folder, dtype="float32", device="cpu"), asked(shelf, str(path))))


@pytest.fixture(scope="module")
def ensemble_lora(ensemble_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For all experts of the tiny ensemble, and for T5 by kohya's name for it."""
    names = {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": torch.Size([32, 24]),
        "lora_unet_conv_out": torch.Size([8, 16, 3, 3]),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": torch.Size([32, 16]),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": torch.Size([16, 16]),
    }
    return write_kohya(tmp_path_factory.mktemp("loras") / "all.safetensors", names)


def test_the_embedded_model_takes_kohyas_names(tmp_path: Path):
    """Its levels have layers of their own."""
    folder = open_folder(None)
    shapes = networks_of(folder, folder.experts[0])[0].shapes
    names = {f"lora_unet_{module.replace('.', '_')}": shapes[module] for module in ("conv_out", "up_blocks.0.resnets.0.conv1")}
    use = Shelf(folder).lora(str(write_kohya(tmp_path / "a.safetensors", names)))
    assert (use.matched, use.keys, use.experts) == (2, 2, ("low", "high"))


def test_one_expert_or_all(ensemble_folder: Path, ensemble_lora: Path):
    shelf = Shelf(open_folder(ensemble_folder))
    model = load_model(shelf.folder, dtype="float32", device="cpu")
    high, low, every = (shelf.lora(f"{ensemble_lora}:2{at}") for at in ("@high", "@low", ""))
    assert [(use.experts, use.matched, use.keys) for use in (high, low, every)] == [(("high",), 4, 4), (("low",), 4, 4), (("low", "high"), 4, 4)]
    settings = {"sampler": "dpmpp_2m", "schedule": "trailing"}
    steps = [
        [event for event in text_to_image(adapted_to(model, shelf, request), request) if isinstance(event, Progress)]
        for request in (asked(shelf, *loras, **settings) for loras in ([], [f"{ensemble_lora}:2@low"], [f"{ensemble_lora}:2"]))
    ]
    plain, only_low, both = steps
    first_low = next(i for i, step in enumerate(plain) if step.expert == "low")
    assert 0 < first_low < STEPS
    assert all(torch.equal(plain[i].x0, only_low[i].x0) for i in range(first_low))
    assert all((plain[i].x0 - only_low[i].x0).abs().max() > 1e-3 for i in range(first_low, STEPS))
    assert all((plain[i].x0 - both[i].x0).abs().max() > 1e-3 for i in range(STEPS))
    with pytest.raises(UsageError, match=r"the expert 'middle', which this model does not have; it has low, high"):
        shelf.lora(f"{ensemble_lora}@middle")
    adapters = shelf.adapters((low,))
    with pytest.raises(UsageError, match="for some only of the experts"):
        baked(adapters, "text_encoder", {}, ["low", "high"])


def test_a_lora_of_sdxl_base_leaves_its_refiner_alone(sdxl_folder: Path, refiner_folder: Path, tmp_path: Path):
    from tu_diffuse.training.composing import compose

    compose([open_folder(sdxl_folder), open_folder(refiner_folder)], [1.0], tmp_path / "both")
    folder = open_folder(tmp_path / "both")
    use = Shelf(folder).lora(str(write_diffusers(tmp_path / "a.safetensors", sdxl_folder)))
    assert use.experts == (folder.experts[1].name,)
    assert use.matched == use.keys
    with pytest.raises(ModelError, match="another shape"):
        Shelf(folder).lora(f"{tmp_path / 'a.safetensors'}@{folder.experts[0].name}")


def test_what_fits_in_part_is_said(sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = kohya_names(sd1_folder, text=False) | {"lora_unet_up_blocks_3_conv": torch.Size([8, 8]), "lora_te2_text_projection": torch.Size([8, 8])}
    path = write_kohya(tmp_path / "half.safetensors", names)
    command = ["generate", "a", "--model", str(sd1_folder), "--steps", "1", "--seed", "1", "--out", str(tmp_path / "a.png"), "--lora", str(path)]
    assert run(command) == 0
    assert f"half.safetensors: {len(names) - 2} of {len(names)} keys fit this model" in capsys.readouterr().err
    (use,) = read_metadata(tmp_path / "a.png")["loras"]
    assert (use["matched"], use["keys"]) == (len(names) - 2, len(names))


# Embeddings


def vectors(count: int, width: int, seed: int = 5) -> Tensor:
    return torch.randn((count, width), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 3])
def test_an_embedding_makes_the_conditioning_and_latents_of_diffusers(sd1_folder: Path, tmp_path: Path, count: int):
    save_file({"<cat>": vectors(count, 16)}, tmp_path / "learned_embeds.safetensors")
    shelf = Shelf(open_folder(sd1_folder))
    request = asked(shelf, prompt="a <cat> b", embeddings=(str(tmp_path / "learned_embeds.safetensors"),))
    assert [(use.token, use.encoders, use.vectors) for use in request.embeddings] == [("<cat>", ("text_encoder",), count)]
    model = load_model(shelf.folder, dtype="float32", device="cpu")
    pipeline = pipeline_of(sd1_folder)
    plain = theirs(pipeline, "a <cat> b")
    pipeline.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    wanted, _ = pipeline.encode_prompt("a <cat> b", "cpu", 1, False)
    got = adapted_to(model, shelf, request).readers["unet"](Text("a <cat> b", "", 32, 32, Reading()))[0].conditioning.tokens
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    latents = theirs(pipeline, "a <cat> b")
    assert (latents - plain).abs().max() > 1e-2
    assert (drawn(model, shelf, request)[0] - latents).abs().max() <= 1e-4
    torch.testing.assert_close(
        model.readers["unet"](Text("a <cat> b", "", 32, 32, Reading()))[0].conditioning.tokens,
        pipeline_of(sd1_folder).encode_prompt("a <cat> b", "cpu", 1, False)[0],
        atol=1e-5,
        rtol=0,
    )


def test_an_embedding_of_sdxl_makes_the_conditioning_of_diffusers(sdxl_folder: Path, tmp_path: Path):
    path = tmp_path / "dog.safetensors"
    tensors = {"clip_l": vectors(2, 16), "clip_g": vectors(2, 24, 6)}
    save_file(tensors, path)
    shelf = Shelf(open_folder(sdxl_folder))
    request = asked(shelf, prompt="a dog.", embeddings=(f"{path}=dog",))
    assert request.embeddings[0].encoders == ("text_encoder", "text_encoder_2")
    model = adapted_to(load_model(shelf.folder, dtype="float32", device="cpu"), shelf, request)
    pipeline = pipeline_of(sdxl_folder)
    pipeline.load_textual_inversion(tensors["clip_l"], token="dog", text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer)
    pipeline.load_textual_inversion(tensors["clip_g"], token="dog", text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2)
    tokens, _, pooled, _ = pipeline.encode_prompt("a dog.", device="cpu", do_classifier_free_guidance=False)
    got = model.readers["unet"](Text("a dog.", "", 32, 32, Reading()))[0].conditioning
    torch.testing.assert_close(got.tokens, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.pooled, pooled, atol=1e-5, rtol=0)


def test_a_legacy_config_still_pools_at_the_end_token():
    """diffusers pools at the new token there, whose id is the largest, and so forgets all that follows."""
    from tiny_models import clip_config, randomised
    from tu_diffuse.text_encoders.clip import CLIPText, CLIPTextConfig, with_rows

    config = CLIPTextConfig.from_dict(clip_config(16).to_dict() | {"eos_token_id": 2})
    model = randomised(CLIPText(config, projection=False), 1)
    extended = with_rows(model, {514: torch.ones(16)})
    ids = torch.tensor([[512, 514, 70, 513, 513]])
    output = extended(ids)
    assert torch.equal(output.pooled, output.last_hidden_state[:, 3])
    assert torch.equal(extended(ids.clamp(max=513)).pooled, model(ids.clamp(max=513)).pooled)


def test_words_stand_where_they_are_written(sd1_folder: Path, tmp_path: Path):
    """`cat` is a word of its own in any case, not the beginning of another; text without it is read as before."""
    save_file({"emb_params": vectors(2, 16)}, tmp_path / "cat.safetensors")
    shelf = Shelf(open_folder(sd1_folder))
    model = load_model(shelf.folder, dtype="float32", device="cpu")
    request = asked(shelf, prompt="a Cat", embeddings=(str(tmp_path / "cat.safetensors"),))
    read = adapted_to(model, shelf, request).readers["unet"]
    plain = model.readers["unet"]

    def tokens(reader: Any, text: str) -> Tensor:
        return reader(Text(text, "", 32, 32, Reading()))[0].conditioning.tokens

    assert torch.equal(tokens(read, "a Cat"), tokens(read, "a cat"))
    assert torch.equal(tokens(read, "cats"), tokens(plain, "cats"))
    assert not torch.equal(tokens(read, "a cat"), tokens(plain, "a cat"))
    assert asked(shelf, prompt="cats", embeddings=(str(tmp_path / "cat.safetensors"),)).embeddings == ()


@pytest.mark.parametrize(
    ("tensors", "spec", "error", "said"),
    [
        ({"<a>": torch.ones(2, 20)}, "", ModelError, "vectors of width 20, the text encoders of 'tiny-sd1' take 16"),
        ({"<a>": torch.ones(2, 16) * torch.nan}, "", ModelError, "NaN"),
        ({"<a>": torch.ones(80, 16)}, "", ModelError, r"\(80, 16\); 1 to 75 vectors"),
        ({"<a>": torch.ones(1, 2, 16)}, "", ModelError, r"\(1, 2, 16\)"),
        ({"<a>": torch.ones(16), "<b>": torch.ones(16)}, "", ModelError, "holds 2 tensors"),
        ({}, "", ModelError, "holds 0 tensors"),
        ({"<a>": torch.ones(16)}, "=two words", UsageError, "cannot stand in a prompt"),
        ({"<a>": torch.ones(16)}, "=", UsageError, "cannot stand in a prompt"),
    ],
)
def test_a_bad_embedding_is_one_sentence(sd1_folder: Path, tmp_path: Path, tensors: dict[str, Tensor], spec: str, error: type[Exception], said: str):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(error, match=said):
        Shelf(open_folder(sd1_folder)).embedding(f"{tmp_path / 'a.safetensors'}{spec}")


def test_a_word_that_is_known_or_given_twice_is_refused(sd1_folder: Path, tmp_path: Path):
    save_file({"<a>": torch.ones(16)}, tmp_path / "a.safetensors")
    save_file({"<a>": torch.zeros(16)}, tmp_path / "b.safetensors")
    shelf = Shelf(open_folder(sd1_folder))
    model = load_model(shelf.folder, dtype="float32", device="cpu")
    with pytest.raises(UsageError, match="knows the word 'a' already"):
        adapted_to(model, shelf, asked(shelf, prompt="a", embeddings=(f"{tmp_path / 'a.safetensors'}=a",)))
    both = asked(shelf, prompt="<a>", embeddings=tuple(str(tmp_path / f"{name}.safetensors") for name in "ab"))
    with pytest.raises(UsageError, match="two embeddings have the word '<a>'"):
        adapted_to(model, shelf, both)


# Commands

Ran = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Ran:
    """Run a command with --json; its lines."""

    def call(*arguments: object, code: int = 0) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert run([*map(str, arguments), "--json"]) == code
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


@pytest.fixture(scope="module")
def files(ensemble_lora: Path) -> Path:
    """A folder with the LoRA and an embedding for the tiny ensemble."""
    save_file({"<cat>": vectors(2, 16)}, ensemble_lora.parent / "cat.safetensors")
    return ensemble_lora.parent


def test_a_picture_records_what_was_added_and_is_replayed(ran: Ran, ensemble_folder: Path, files: Path, tmp_path: Path, capsys: Any):
    out, adapters = tmp_path / "p.png", ["--lora", f"{files / 'all.safetensors'}:0.5@low", "--embedding", files / "cat.safetensors"]
    ran("generate", "a <cat>", "--model", ensemble_folder, "--out", out, "--seed", 3, "--steps", 3, "--device", "cpu", *adapters)
    settings = read_metadata(out)
    assert settings["loras"] == [
        {"name": "all.safetensors", "hash": settings["loras"][0]["hash"], "weight": 0.5, "expert": "low", "experts": ["low"], "matched": 4, "keys": 4}
    ]
    assert [(one["name"], one["token"], one["encoders"], one["vectors"]) for one in settings["embeddings"]] == [
        ("cat.safetensors", "<cat>", ["text_encoder"], 2)
    ]
    assert str(files) not in out.read_bytes().decode("latin1")
    shelf = tmp_path / "shelf" / "by hash"
    shelf.mkdir(parents=True)
    (shelf / "a.safetensors").write_bytes(b"no weights")
    shutil.copy(files / "all.safetensors", shelf / "renamed.safetensors")
    shutil.copy(files / "cat.safetensors", shelf)
    assert ran("replay", out, "--model", ensemble_folder, "--lora", shelf.parent)[0]["equal"]
    assert ran("replay", out, "--model", ensemble_folder, "--lora", files / "all.safetensors", "--embedding", files / "cat.safetensors")[0]["equal"]
    assert run(["replay", str(out), "--model", str(ensemble_folder), "--embedding", str(files / "cat.safetensors")]) == 2
    assert f"all.safetensors (SHA-256 {settings['loras'][0]['hash'][:12]}…) is not there" in capsys.readouterr().err


def test_lines_of_a_prompt_file_swap_loras(ran: Ran, ensemble_folder: Path, files: Path, tmp_path: Path):
    """In either order of work; nothing is loaded twice for it, and each picture is that of `generate`."""
    lora, cat = files / "all.safetensors", files / "cat.safetensors"
    lines: list[dict[str, Any]] = [
        {"prompt": "a"},
        {"prompt": "a", "lora": [f"{lora}:2"]},
        {"prompt": "a", "lora": [f"{lora}:2@low", f"{lora}:-1@high"]},
        {"prompt": "a <cat>", "embedding": [str(cat)]},
        {"prompt": "a"},
        {"prompt": "b", "lora": [str(files / "none.safetensors")]},
        {"prompt": "b", "lora": [str(cat)]},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line | {"seed": 5}) + "\n" for line in lines))
    common = ("--model", ensemble_folder, "--steps", 3, "--device", "cpu")
    pictures: dict[str, list[bytes]] = {}
    for memory in ("8", "1e-4"):
        out = tmp_path / memory
        events = ran("batch", prompts, "--out", out, *common, "--memory", memory, "--batch-size", 1, code=1)
        problems = [(event["line"], event["message"]) for event in events if event["event"] == "problem"]
        assert [line for line, _ in problems] == [6, 7]
        assert "'none.safetensors' is not there" in problems[0][1]
        assert "no part of a LoRA" in problems[1][1]
        assert events[-1]["done"] == 5
        assert memory != "8" or set(events[-1]["loads"].values()) == {1}
        named = {event["line"]: Path(event["path"]) for event in events if event["event"] == "picture"}
        pictures[memory] = [named[line].read_bytes() for line in range(1, 6)]
    assert pictures["8"] == pictures["1e-4"]
    assert len(set(pictures["8"])) >= 4
    assert read_metadata(named[3])["loras"][1]["weight"] == -1
    assert ran("replay", named[3], "--model", ensemble_folder, "--lora", files)[0]["equal"]
    options = [part for text in lines[2]["lora"] for part in ("--lora", text)]
    path = ran("generate", "a", *common, "--seed", 5, "--out", tmp_path / "one.png", *options)[0]["path"]
    from PIL import Image

    assert Image.open(path).tobytes() == Image.open(named[3]).tobytes() != Image.open(named[1]).tobytes()
    assert ran("batch", prompts, "--out", tmp_path / "8", *common, "--batch-size", 1, code=1)[-1]["drawn"] == 0


def test_a_sweep_over_weights(ran: Ran, ensemble_folder: Path, files: Path, tmp_path: Path):
    (tmp_path / "p.txt").write_text("a\n")
    lora = files / "all.safetensors"
    events = ran(
        "batch", tmp_path / "p.txt", "--out", tmp_path / "out", "--model", ensemble_folder, "--steps", 2, "--sweep", f"lora={lora}:0,{lora}:2"
    )
    weights = [read_metadata(Path(event["path"]))["loras"][0]["weight"] for event in events if event["event"] == "picture"]
    assert sorted(weights) == [0, 2]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--lora", "{files}/none.safetensors"], 2, "'none.safetensors' is not there"),
        (["--lora", "{files}/style.pt"], 3, "pickle"),
        (["--lora", "{files}/cat.safetensors"], 4, "no part of a LoRA"),
        (["--lora", "{files}/all.safetensors@x"], 2, "the expert 'x'"),
        (["--embedding", "{files}/all.safetensors"], 4, "holds 12 tensors"),
        (["--embedding", "{files}/style.pt"], 3, "pickle"),
        (["--embedding", "{files}/cat.safetensors"], 2, "stands in no prompt"),
    ],
)
def test_exit_codes(ensemble_folder: Path, files: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, said: str):
    (files / "style.pt").write_bytes(b"\x80\x04.")
    assert run(["generate", "a", "--model", str(ensemble_folder), *(option.format(files=files) for option in options)]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
