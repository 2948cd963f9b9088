"""Two processes (gloo) train as one process with the whole batch does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
from pathlib import Path
from tu_diffuse.training.loop import batch_indices, train
from tu_diffuse.training.train_config import TrainConfig
from tu_diffuse.training.workers import joined_workers

torch.manual_seed(0)
torch.set_num_threads(1)
data = torch.randn(32, 6)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
config = TrainConfig(steps=20, lr=0.05, warmup=3, log_every=1, save_every=10, max_grad_norm=1e9)

with joined_workers() as workers:
    def loss_at(step):
        rows = data[batch_indices(32, 8, 0, step)[workers.rows]]
        return {"loss": (model(rows) - rows.sum(1, keepdim=True).sin()).square().mean()}

    trained = train(model, loss_at, config, Path(sys.argv[1]), lambda line: None, workers)
    if workers.writes:
        print([round(value, 6) for value in trained[0].weight.flatten().tolist()])
"""

EXPERTS = """
import sys, torch
from pathlib import Path
from tu_diffuse.training.loop import train
from tu_diffuse.training.train_config import TrainConfig
from tu_diffuse.training.workers import joined_workers

torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 1) for name in "abc"})
before = model["c"].weight.detach().clone()
config = TrainConfig(steps=12, lr=0.05, warmup=0, log_every=1, save_every=10, max_grad_norm=1e9)

with joined_workers() as workers:
    def loss_at(step):
        rows = torch.randn((2, 3), generator=torch.Generator().manual_seed(step))
        owners = ("a", "b") if step % 3 else ("a", "a")  # one process may have no row of an expert, and at times nobody has one
        mine = list(zip(rows, owners))[workers.rows]
        return {"loss": torch.stack([(model[owner](row) - row.sum()).square().mean() for row, owner in mine]).mean()}

    trained = train(model, loss_at, config, Path(sys.argv[1]), lambda line: None, workers)
    if workers.writes:
        assert torch.equal(trained["c"].weight, before)
        print([round(value, 6) for name in "ab" for value in trained[name].weight.flatten().tolist()])
"""


def run(folder: Path, processes: int, text: str = SCRIPT) -> list[float]:
    script = folder / "script.py"
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(script)]
    done = subprocess.run([*command, str(folder / str(processes))], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_two_processes_end_at_the_weights_of_one(tmp_path: Path) -> None:
    one, two = run(tmp_path, 1), run(tmp_path, 2)
    assert one == pytest.approx(two, abs=2e-5)
    assert max(map(abs, one)) > 0.1
    logs = [(tmp_path / str(n) / "losses.jsonl").read_text().splitlines() for n in (1, 2)]
    assert [json.loads(line)["step"] for line in logs[1]] == list(range(1, 21))
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert min(losses[0]) > 0.01


def test_an_expert_without_rows_in_one_process_trains_all_the_same(tmp_path: Path) -> None:
    one, two = run(tmp_path, 1, EXPERTS), run(tmp_path, 2, EXPERTS)
    assert one == pytest.approx(two, abs=2e-5)
    assert len(set(one)) == 6
