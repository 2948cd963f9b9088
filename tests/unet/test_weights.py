"""Weight files: what is taken, and how what is not is refused."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from tu_diffuse.errors import ModelError, UnsafeError
from tu_diffuse.model_files import MAX_HEADER_BYTES, read_header, weight_files, weights_sha256
from tu_diffuse.weights import load_weights

STEM = "diffusion_pytorch_model"


class Net(nn.Module):
    """A linear layer, an integer buffer that is stored and a float one that is not."""

    def __init__(self, width=3, table_device="cpu"):
        super().__init__()
        self.linear = nn.Linear(4, width)
        self.register_buffer("ids", torch.arange(5))
        self.register_buffer("table", torch.arange(3.0, device=table_device), persistent=False)


def meta(**kwargs):
    with torch.device("meta"):
        return Net(**kwargs)


@pytest.fixture
def saved(tmp_path):
    net = Net()
    save_file(net.state_dict(), tmp_path / f"{STEM}.safetensors")
    return tmp_path, net


def test_weights_arrive_and_unsaved_buffers_survive(saved):
    folder, net = saved
    loaded = load_weights(meta(), folder)
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {k: v.tolist() for k, v in net.state_dict().items()}
    assert loaded.table.tolist() == [0, 1, 2]
    assert not loaded.training
    assert not loaded.linear.weight.requires_grad


def test_a_buffer_without_storage_is_an_error(saved):
    with pytest.raises(ModelError, match="table"):
        load_weights(meta(table_device=None), saved[0])


def test_dtype_goes_to_float_tensors_only(saved):
    loaded = load_weights(meta(), saved[0], dtype=torch.bfloat16)
    assert (loaded.linear.weight.dtype, loaded.ids.dtype) == (torch.bfloat16, torch.int64)


def test_weights_stay_in_the_mapped_file(saved):
    loaded = load_weights(meta(), saved[0])
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if str(saved[0]) in line]
    address = loaded.linear.weight.data_ptr()
    assert any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


def test_a_sharded_model_and_its_variant(tmp_path):
    net = Net()
    for suffix in ("", ".fp16"):
        shards = {f"{STEM}{suffix}-0000{i + 1}-of-00002.safetensors": names for i, names in enumerate((["linear.weight"], ["linear.bias", "ids"]))}
        for file, names in shards.items():
            save_file({name: net.state_dict()[name] * (2 if suffix else 1) for name in names}, tmp_path / file)
        weight_map = {name: file for file, names in shards.items() for name in names}
        (tmp_path / f"{STEM}.safetensors.index{suffix}.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(load_weights(meta(), tmp_path).linear.weight, net.linear.weight)
    assert torch.equal(load_weights(meta(), tmp_path, variant="fp16").linear.weight, net.linear.weight * 2)
    assert len(weight_files(tmp_path)) == 2
    assert len(weights_sha256(tmp_path)) == 64


def test_the_only_variant_is_taken_and_of_two_one_must_be_chosen(tmp_path):
    save_file(Net().state_dict(), tmp_path / f"{STEM}.fp16.safetensors")
    assert load_weights(meta(), tmp_path).linear.weight.is_floating_point()
    save_file(Net().state_dict(), tmp_path / f"{STEM}.non_ema.safetensors")
    with pytest.raises(ModelError, match="fp16, non_ema"):
        load_weights(meta(), tmp_path)
    with pytest.raises(ModelError, match="fp16, non_ema"):
        load_weights(meta(), tmp_path, variant="bf16")


def test_convert_moves_and_leaves_out(tmp_path):
    state = {f"text_model.{name}": tensor for name, tensor in Net().state_dict().items()} | {"position_ids": torch.zeros(1)}
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_weights(
        meta(), tmp_path, "model", convert=lambda tensors: {n.removeprefix("text_model."): t for n, t in tensors.items() if n != "position_ids"}
    )
    assert torch.equal(loaded.linear.weight, state["text_model.linear.weight"])


def test_mismatches_are_named_at_most_five_each(tmp_path):
    state = Net(width=2).state_dict() | {f"extra.{i}": torch.zeros(1) for i in range(7)}
    del state["ids"]
    save_file(state, tmp_path / f"{STEM}.safetensors")
    with pytest.raises(ModelError) as raised:
        load_weights(meta(), tmp_path)
    message = str(raised.value)
    assert "1 missing: ids" in message
    assert "7 unexpected: extra.0, extra.1, extra.2, extra.3, extra.4, …" in message
    assert "linear.weight (2, 4) for (3, 4)" in message
    assert "extra.5" not in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity(tmp_path, bad, dtype):
    state = Net().state_dict()
    state["linear.bias"] = torch.tensor([0, bad, 0], dtype=dtype)
    save_file(state, tmp_path / f"{STEM}.safetensors")
    with pytest.raises(ModelError, match=r"linear\.bias"):
        load_weights(meta(), tmp_path)


def test_another_kind_of_tensor(tmp_path):
    state = Net().state_dict()
    save_file(state | {"linear.bias": torch.zeros(3, dtype=torch.int8)}, tmp_path / f"{STEM}.safetensors")
    with pytest.raises(ModelError, match="another kind"):
        load_weights(meta(), tmp_path)


def test_every_cut_and_every_flipped_header_byte_is_a_model_error(saved):
    folder, _ = saved
    path = folder / f"{STEM}.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            load_weights(meta(), folder)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for position in range(0, header):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x15]) + whole[position + 1 :])
        try:
            loaded = load_weights(meta(), folder)
        except ModelError:
            continue
        # A flip that leaves valid JSON with fitting names changes no tensor's place.
        assert loaded.linear.weight.shape == (3, 4)


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2**62])
def test_a_header_of_absurd_length(tmp_path, length):
    path = tmp_path / f"{STEM}.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" * 100)
    with pytest.raises(ModelError, match="header"):
        load_weights(meta(), tmp_path)


def test_too_many_tensors(tmp_path):
    header = json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_001)}).encode()
    path = tmp_path / f"{STEM}.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ModelError, match="20001"):
        read_header(path)


@pytest.mark.parametrize("name", [f"{STEM}.bin", "model.ckpt", "weights.pt", "weights.pth", "x.pkl"])
def test_only_pickles_is_unsafe(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UnsafeError, match=name):
        load_weights(meta(), tmp_path)


def test_an_empty_folder_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=STEM):
        load_weights(meta(), tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors", "C:\\x", "", 5, None])
def test_an_index_may_not_point_outside(tmp_path, name):
    folder = tmp_path / "unet"
    folder.mkdir()
    save_file(Net().state_dict(), tmp_path / "secret.safetensors")
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": {"linear.weight": name}}))
    with pytest.raises(ModelError, match="leave the model folder"):
        load_weights(meta(), folder)


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ({"weight_map": {"linear.weight": "pytorch_model.bin"}}, UnsafeError),
        ({"weight_map": {"linear.weight": "absent.safetensors"}}, ModelError),
        ({"weight_map": {"other": "there.safetensors"}}, ModelError),
        ({"weight_map": {}}, ModelError),
        ({"weight_map": []}, ModelError),
        ({}, ModelError),
        ([], ModelError),
    ],
)
def test_a_bad_index(tmp_path, index, error):
    save_file(Net().state_dict(), tmp_path / "there.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error):
        load_weights(meta(), tmp_path)
