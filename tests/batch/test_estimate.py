"""What `--dry-run` expects of several devices, with a clock that goes one second at each look."""

from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tu_diffuse.batch import estimate
from tu_diffuse.batch.plan import Plan, extend
from tu_diffuse.pipeline.model.folder import ModelFolder


def test_workers_that_share_a_device_share_its_speed(studio, items, ensemble: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    plan = extend(Plan(ensemble.fingerprint), items("a", "b", "c", "d", steps=5), 1)
    here = studio().place
    elsewhere = replace(here, device=torch.device("cuda", 0))

    def seconds(*places) -> float:
        return estimate.expect(studio(), plan, tmp_path, (1, 1), 0, places).seconds

    assert seconds(here) == seconds(here, here) == 4 * (5 * 1 + 1)
    assert seconds(here, elsewhere) == 2 * (5 * 1 + 1)
