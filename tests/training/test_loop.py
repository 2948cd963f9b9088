"""The training loop: exact resume, torn checkpoints, the order of samples, the learning rate, the moving average."""

import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_training import CONFIG, DATA, run
from tu_diffuse.errors import DataError, OutputError, TrainingError, UsageError
from tu_diffuse.training import checkpoints
from tu_diffuse.training.checkpoints import load_newest
from tu_diffuse.training.loop import InterruptedRunError, batch_indices, train, update_average
from tu_diffuse.training.train_config import TrainConfig


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    run(tmp_path, TrainConfig(steps=400, lr=0.02, warmup=3, log_every=20))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize("stop_at", [1, 5, 9, 11])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    whole_model, whole_average = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_at=stop_at)
    model, average = run(tmp_path / "killed")
    for ours, theirs in ((model, whole_model), (average, whole_average)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert not torch.equal(model[0].weight, average[0].weight)  # type: ignore[union-attr]
    one, other = (load_newest(tmp_path / name) for name in ("whole", "killed"))
    assert one is not None
    assert other is not None
    assert all(torch.equal(tensor, other.optimizer[name]) for name, tensor in one.optimizer.items())
    assert (tmp_path / "whole" / "losses.jsonl").read_text() == (tmp_path / "killed" / "losses.jsonl").read_text()


def test_torn_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    run(tmp_path)
    newest = tmp_path / "checkpoint-00000012" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    lines: list[str] = []
    found = load_newest(tmp_path, lines.append)
    assert found is not None
    assert found.step == 8
    assert lines == ["checkpoint-00000012 is damaged and passed over for the one before it"]
    (tmp_path / "checkpoint-00000008" / "state.json").unlink()
    with pytest.raises(DataError, match="none of the 2 checkpoints"):
        run(tmp_path)


def test_only_whole_checkpoints_are_left(tmp_path: Path) -> None:
    run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000008", "checkpoint-00000012", "losses.jsonl"]


def test_lengthened_run_equals_the_longer_one(tmp_path: Path) -> None:
    long = TrainConfig(steps=12, lr=0.05, warmup=3, cooldown=0, save_every=4)
    run(tmp_path / "two", TrainConfig(steps=8, lr=0.05, warmup=3, cooldown=0, save_every=4))
    two, _ = run(tmp_path / "two", long)
    one, _ = run(tmp_path / "one", long)
    assert torch.equal(one[0].weight, two[0].weight)  # type: ignore[union-attr]


def test_step_with_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    before = model.weight.clone()
    train(model, lambda step: {"loss": model(torch.tensor([[1.0, float("inf")]])).mean()}, TrainConfig(steps=1, lr=1.0), tmp_path, lambda line: None)
    assert torch.equal(model.weight, before)


def test_each_sample_once_an_epoch_and_another_order_in_the_next() -> None:
    epochs = [torch.cat([batch_indices(40, 8, 3, step) for step in range(5 * epoch, 5 * epoch + 5)]) for epoch in range(2)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(40))
    assert not torch.equal(*epochs)


def test_learning_rate_rises_stays_and_falls() -> None:
    config = TrainConfig(steps=100, lr=2.0, warmup=10, cooldown=40)
    rates = [config.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:60] == pytest.approx([2.0] * 51)
    assert rates[80] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.01


def test_learning_rate_falls_as_asked() -> None:
    """At a quarter of the fall the rate is (1 + cos(π/4))/2, 3/4, or 1 − √(1/4) of the highest."""
    for fall, share in (("cosine", (1 + math.sqrt(0.5)) / 2), ("linear", 0.75), ("sqrt", 0.5)):
        config = TrainConfig(steps=100, lr=2.0, warmup=10, cooldown=40, fall=fall)
        assert config.learning_rate(59) == config.learning_rate(60) == pytest.approx(2.0)
        assert config.learning_rate(70) == pytest.approx(2.0 * share)
        assert 0 < config.learning_rate(99) < 0.06


def test_moving_average_of_a_constant_gradient() -> None:
    average = {"w": torch.zeros(1)}
    for _ in range(3):
        update_average(average, {"w": torch.ones(1)}, 0.5)
    assert average["w"].item() == pytest.approx(1 - 0.5**3)


class Fits(nn.Module):
    """One weight that is pulled to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def loss(self, factor: float = 1.0) -> dict[str, Tensor]:
        return {"loss": ((self.w - 1) * factor).square().mean()}


def test_nan_is_skipped_three_in_a_row_stop_and_no_checkpoint_holds_it(tmp_path: Path) -> None:
    config = TrainConfig(steps=40, lr=0.1, warmup=0, save_every=1, log_every=1)
    model, lines = Fits(), list[str]()
    bad = {3, 7, 8, 20, 21, 22}
    with pytest.raises(TrainingError, match="step 23"):
        train(model, lambda step: model.loss(math.nan if step in bad else 1.0), config, tmp_path, lambda line: lines.append(str(line)))
    assert [line.split(":")[0] for line in lines if "not finite" in line] == [f"step {step + 1}" for step in sorted(bad)]
    found = load_newest(tmp_path)
    assert found is not None
    assert all(tensor.isfinite().all() for part in (found.model, found.average, found.optimizer) for tensor in part.values())
    assert 0.5 < found.model["w"].item() < 1.5
    log = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in log if "loss" in line)


def test_a_run_told_to_stop_saves_that_step_and_goes_on_exactly(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(InterruptedRunError, match="step 6 of 12"):
        run(tmp_path / "cut", told_at=5)
    found = load_newest(tmp_path / "cut")
    assert found is not None
    assert found.step == 6
    again, _ = run(tmp_path / "cut")
    assert torch.equal(again[0].weight, whole[0].weight)  # type: ignore[union-attr]


def test_accumulated_micro_steps_equal_one_large_batch(tmp_path: Path) -> None:
    def trained(accumulate: int) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(6, 1)
        config = TrainConfig(steps=8, lr=0.05, accumulate=accumulate, warmup=0, max_grad_norm=1e9)

        def loss_at(step: int) -> dict[str, Tensor]:
            rows = DATA[step * 8 // accumulate % 40 :][: 8 // accumulate]
            return {"loss": (model(rows) - rows.sum(1, keepdim=True)).square().mean()}

        train(model, loss_at, config, tmp_path / str(accumulate), lambda line: None)
        return model.weight.detach()

    one, two = trained(1), trained(2)
    assert torch.allclose(one, two, atol=1e-6)
    assert one.abs().max() > 0.1


@pytest.mark.parametrize("limit", [0.01, 1.0, 1e9])  # all gradients are longer, some are, none is
def test_long_gradients_are_scaled_as_by_pytorch_itself(tmp_path: Path, limit: float) -> None:
    def made() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(6, 1)

    def loss_of(model: nn.Linear, step: int) -> Tensor:
        rows = DATA[8 * (step % 5) :][:8]
        return (1 + step) * (model(rows) - rows.sum(1, keepdim=True)).square().mean()

    config = TrainConfig(steps=8, lr=0.05, warmup=0, cooldown=0, max_grad_norm=limit)
    ours, theirs = made(), made()
    train(ours, lambda step: {"loss": loss_of(ours, step)}, config, tmp_path, lambda line: None)
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=config.betas, weight_decay=config.weight_decay, fused=True)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        optimizer.zero_grad()
        loss_of(theirs, step).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), limit)
        optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)
    assert not torch.allclose(ours.weight, made().weight, atol=0.1)


@pytest.mark.parametrize("change", [{"lr": 0.04}, {"seed": 6}, {"accumulate": 2}, {"weight_decay": 0.0}])
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict[str, float]) -> None:
    run(tmp_path)
    with pytest.raises(UsageError, match=next(iter(change))):
        run(tmp_path, replace(CONFIG, **change))


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    model = Fits()
    config = TrainConfig(steps=2, lr=0.1)
    train(model, lambda step: model.loss(), config, tmp_path, lambda line: None, identity={"data": "a"})
    with pytest.raises(UsageError, match="identity"):
        train(model, lambda step: model.loss(), config, tmp_path, lambda line: None, identity={"data": "b"})


def test_a_run_whose_rate_has_begun_to_fall_cannot_be_lengthened(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UsageError, match="length"):
        run(tmp_path, replace(CONFIG, steps=24))


def test_a_full_disk_stops_the_run_with_the_checkpoint_before_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoints.save_file
    calls: list[int] = []

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(1)
        if len(calls) > 5:  # four files a checkpoint: the second one of the second
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OutputError, match="disk is full at step 8"):
        run(tmp_path)
    found = load_newest(tmp_path)
    assert found is not None
    assert found.step == 4
    monkeypatch.setattr(checkpoints, "save_file", real)
    whole, _ = run(tmp_path.with_name("whole"))
    again, _ = run(tmp_path)
    assert torch.equal(again[0].weight, whole[0].weight)  # type: ignore[union-attr]


def test_a_run_that_waits_goes_on_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(tmp_path / "whole")
    real, left = checkpoints.save_file, [2]

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    monkeypatch.setattr("tu_diffuse.training.saving.POLL_SECONDS", 0.01)
    waited, _ = run(tmp_path / "waited", replace(CONFIG, when_full="wait"))
    assert torch.equal(waited[0].weight, whole[0].weight)  # type: ignore[union-attr]


def test_without_an_average_the_last_weights_are_the_result(tmp_path: Path) -> None:
    model, result = run(tmp_path, replace(CONFIG, ema_decay=None))
    assert torch.equal(model[0].weight, result[0].weight)  # type: ignore[index]
