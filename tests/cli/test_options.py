"""Options in groups: a command sees all of them, and no option of a line is one that a command does not have."""

import inspect
import re
from dataclasses import dataclass, fields
from typing import Annotated

import pytest
import typer
from tu_diffuse.batch.options import BY_NAME
from tu_diffuse.cli.batch import batch
from tu_diffuse.cli.finetune import finetune
from tu_diffuse.cli.generate import generate
from tu_diffuse.cli.options import grouped
from tu_diffuse.training.config import FinetuneConfig
from typer.testing import CliRunner


@dataclass(frozen=True)
class _Box:
    wide: Annotated[int, typer.Option(help="In steps.")] = 3
    deep: Annotated[float | None, typer.Option()] = None


def test_each_field_of_a_group_is_an_option_in_its_place():
    seen: list[object] = []

    @grouped
    def command(first: Annotated[str, typer.Argument()], *, box: _Box, last: Annotated[bool, typer.Option("--last")] = False) -> None:
        seen.append((first, box, last))

    app = typer.Typer()
    app.command()(command)
    assert list(inspect.signature(command).parameters) == ["first", "wide", "deep", "last"]
    assert CliRunner().invoke(app, ["a", "--deep", "0", "--last"]).exit_code == 0
    assert CliRunner().invoke(app, ["b", "--wide", "7"]).exit_code == 0
    assert seen == [("a", _Box(3, 0.0), True), ("b", _Box(7), False)]
    assert CliRunner().invoke(app, ["a", "--wide", "x"]).exit_code == 2


@pytest.mark.parametrize("command", [generate, batch], ids=["generate", "batch"])
def test_each_option_of_a_line_is_an_option_of_the_command(command: object):
    assert callable(command)
    assert set(BY_NAME) - {"prompt", "seeds"} <= set(inspect.signature(command).parameters)


def test_each_option_of_generate_is_one_of_the_run_or_of_a_line_too():
    of_generate = set(inspect.signature(generate).parameters) - set(BY_NAME)
    alone = {"prompts", "out", "steps_strip", "preview"}
    assert of_generate - alone <= set(inspect.signature(batch).parameters) - set(BY_NAME)
    assert alone <= of_generate


def test_the_flags_of_finetune_are_the_keys_of_its_config_and_tell_its_defaults():
    flags = {"filter" if name == "preset" else name: flag.annotation for name, flag in inspect.signature(finetune).parameters.items()}
    of_the_command = {"out", "config", "model", "prediction_type", "dry_run", "device", "as_json", "debug"}
    config = {field.name: field.default for field in fields(FinetuneConfig)}
    assert set(flags) - of_the_command == set(config)
    told = {name: re.search(r"\[default: ([^\];]+)", flags[name].__metadata__[0].help or "") for name in config}
    plain = {name: default for name, default in config.items() if isinstance(default, int | float | str) and not isinstance(default, bool)}
    assert len(plain) > 15
    for name, default in plain.items():
        found = told[name]
        assert found is not None, name
        assert type(default)(found[1]) == default, name
