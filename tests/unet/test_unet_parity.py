"""The U-Net computes what diffusers' class computes, from the same files."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from tu_diffuse.unet.config import UNetConfig
from tu_diffuse.unet.unet import UNet
from unet_configs import FAMILIES, inputs, random_unet, randomize


def oracle(family: str) -> UNet2DConditionModel:
    model = UNet2DConditionModel(**FAMILIES[family])
    randomize(model)
    return model.eval().requires_grad_(False)


def ask_oracle(model, x, t, tokens, pooled=None, size_ids=None, mask=None):
    added = None if size_ids is None else {"text_embeds": pooled, "time_ids": size_ids}
    labels = pooled if size_ids is None else None
    return model(x, t, tokens, class_labels=labels, added_cond_kwargs=added, encoder_attention_mask=mask).sample


def ask(unet, x, t, tokens, **rest):
    return unet(x, t, unet.text_keys_values(tokens), **rest)


@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_output_as_diffusers(family, size):
    theirs, ours = oracle(family), UNet(UNetConfig.from_dict(FAMILIES[family])).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    given = inputs(family, size=size)
    expected = ask_oracle(theirs, **given)
    assert 0.2 < expected.std() < 5
    assert (ask(ours, **given) - expected).abs().max() <= 1e-5
    channels_last = ours.to(memory_format=torch.channels_last)
    assert (ask(channels_last, **given) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_config_goes_to_diffusers_and_back(family):
    config = UNetConfig.from_dict(FAMILIES[family])
    model = UNet2DConditionModel.from_config(config.to_dict())
    assert UNetConfig.from_dict(dict(model.config)) == config
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in UNet(config).state_dict().items()}


def test_asymmetric_levels():
    fields = FAMILIES["sdxl"] | {
        "layers_per_block": [1, 2, 1],
        "transformer_layers_per_block": [1, 2, 1],
        "reverse_transformer_layers_per_block": [2, 1, 1],
    }
    theirs, ours = UNet2DConditionModel(**fields).eval(), UNet(UNetConfig.from_dict(fields)).eval()
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    given = inputs("sdxl")
    with torch.no_grad():
        assert (ask(ours, **given) - ask_oracle(theirs, **given)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["sd1", "embedded"])
def test_mask_is_diffusers_mask(family):
    theirs, ours, given = oracle(family), random_unet(family), inputs(family)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1, 0]], dtype=torch.bool)
    masked = ask(ours, **given, mask=mask)
    assert (masked - ask_oracle(theirs, **given, mask=mask)).abs().max() <= 1e-5
    assert (masked - ask(ours, **given)).abs().max() > 1e-2


def test_row_without_tokens_attends_to_all_as_in_diffusers():
    theirs, ours, given = oracle("sd1"), random_unet("sd1"), inputs("sd1")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    mask = torch.tensor([[False] * 7, [True] * 3 + [False] * 4])
    # diffusers adds -10000 to every score of that row, which in float32 rounds them to 1e-3.
    assert (ask(ours, **given, mask=mask) - ask_oracle(theirs, **given, mask=mask)).abs().max() <= 1e-3


def test_masked_pads_have_no_effect_at_all():
    unet, given = random_unet("embedded"), inputs("embedded")
    mask = torch.arange(7).expand(2, 7) < 4
    changed = given | {"tokens": torch.where(mask[..., None], given["tokens"], torch.full((), 1e4))}
    masked = ask(unet, **given, mask=mask)
    assert torch.equal(masked, ask(unet, **changed, mask=mask))
    truncated = ask(unet, **(given | {"tokens": given["tokens"][:, :4]}))
    assert (masked - truncated).abs().max() <= 1e-6 * masked.abs().max()


def test_training_gives_gradients_to_every_parameter():
    unet, given = random_unet("embedded").train().requires_grad_(True), inputs("embedded")
    ask(unet, **given, mask=torch.arange(7).expand(2, 7) < 4).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in unet.parameters())


def test_gradients_are_those_of_diffusers():
    theirs, ours, given = oracle("sd1").requires_grad_(True), random_unet("sd1").requires_grad_(True), inputs("sd1")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ask_oracle(theirs, **given).square().mean().backward()
    ask(ours, **given).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - expected[name].grad).abs().max() <= 1e-4 * expected[name].grad.abs().max() + 1e-7, name


def test_recorder_sees_every_layer_and_changes_nothing():
    unet, given, seen = random_unet("sdxl"), inputs("sdxl"), {}
    plain = ask(unet, **given)
    recorded = ask(unet, **given, recorder=lambda name, query, key: seen.update({name: (query.shape, key.shape)}))
    assert torch.equal(plain, recorded)
    assert list(seen) == [name for name, _ in unet.cross_attention_layers()]
    assert seen["mid_block.attentions.0.transformer_blocks.2.attn2"] == ((2, 4, 4, 12), (2, 4, 7, 12))


def test_recorded_query_and_key_are_the_ones_attended_with():
    unet, given, maps = random_unet("embedded"), inputs("embedded"), []
    ask(unet, **given, recorder=lambda name, query, key: maps.append((query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)))
    assert all(torch.allclose(m.sum(-1), torch.ones(())) for m in maps)
    assert all(m.std() > 1e-3 for m in maps)


@pytest.mark.parametrize("left_out", ["pooled", "size_ids"])
def test_missing_vector_is_refused(left_out):
    unet, given = random_unet("sdxl"), inputs("sdxl")
    del given[left_out]
    with pytest.raises(ValueError, match="not given"):
        ask(unet, **given)


def test_unused_vector_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        ask(random_unet("sd1"), **inputs("sd1"), pooled=torch.zeros(2, 20))


@torch.no_grad()
def test_upcast_attention_runs_in_float32():
    fields = FAMILIES["sd2"]
    given = {name: tensor.bfloat16() for name, tensor in inputs("sd2").items()}
    outputs = []
    for upcast in (True, False):
        unet = UNet(UNetConfig.from_dict(fields | {"upcast_attention": upcast}))
        outputs.append(ask(randomize(unet).eval().to(torch.bfloat16), **given))
    assert outputs[0].dtype == torch.bfloat16
    assert not torch.equal(outputs[0], outputs[1])
