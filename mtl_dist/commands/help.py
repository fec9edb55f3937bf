"""The text of `--help`: paragraphs flow to the width of the terminal, and commands keep their lines."""

from __future__ import annotations

import inspect
from typing import Any


def flowing(command: Any) -> Any:
    r"""A command whose help can be printed at any width; None stays None.

    Typer itself keeps the line breaks of the source in all paragraphs but the first. Those that begin with
    \b keep them here.
    """
    if command is not None and command.help:
        paragraphs = inspect.cleandoc(command.help).split("\n\n")
        command.help = "\n\n".join(
            text if text.startswith("\b") else text.replace("\n", " ") for text in paragraphs
        )
    return command
