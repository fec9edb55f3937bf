"""`python -m benchmarks`: its commands, and that none of it is in the wheel."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

import pytest
import typer
from setuptools import find_packages

from benchmarks.__main__ import app

ROOT = Path(__file__).parents[3]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_the_wheel_holds_the_package_alone() -> None:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    include = settings["options.packages.find"]["include"].split()
    packages = find_packages(str(ROOT), include=include)
    assert {name.partition(".")[0] for name in packages} == {"mtl_dist"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_measures_and_explains_every_choice(name: str) -> None:
    assert COMMANDS[name].help
    assert [parameter.name for parameter in COMMANDS[name].params if not parameter.help] == []
