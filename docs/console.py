"""The picture of a terminal in training, docs/console.svg.

    python docs/console.py docs/console.svg "epoch 5/6" train configs/digits.yaml train.epochs=6

runs `mtl train ...` in a terminal of 104 columns until a line begins with these words, and a second longer;
what is then on the screen is the picture, and the run is stopped as by Ctrl-C.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import sys
import termios
import time

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

_COLUMNS, _LINES = 104, 60
_STEP = re.compile(r"\x1b\[(\d*)A|(\x1b\[[\d;]*m)|\x1b\[2?K|\x1b\[\?25[lh]|(\r)|(\n)|([^\x1b\r\n]+)")


def screen_of(output: str) -> list[str]:
    """The lines that a terminal shows, with their colours, after what Rich writes: it goes up and over."""
    lines, row = [""], 0
    for found in _STEP.finditer(output):
        up, colour, back, down, text = found.groups()
        if up is not None:
            row = max(0, row - int(up or 1))
        elif down:
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif back or found[0].endswith("K"):
            lines[row] = "" if found[0].endswith("K") else lines[row]
        elif colour or text:
            lines[row] += found[0]
    return lines


def shown(words: str, command: list[str]) -> str:
    """What the command writes until a second after `words` begin a line."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(_COLUMNS), "LINES": str(_LINES)}
        os.execv(sys.executable, [sys.executable, "-m", "mtl_dist", *command])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", _LINES, _COLUMNS, 0, 0))
    output, end = b"", float("inf")
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                output += os.read(terminal, 65536)
            except OSError:  # it has ended
                break
        if end == float("inf") and f"\n{words}".encode() in re.sub(rb"\x1b\[[\d;]*[A-Za-z]", b"", output):
            end = time.monotonic() + 1
    os.kill(process, 2)
    while select.select([terminal], [], [], 30)[0]:
        try:
            os.read(terminal, 65536)
        except OSError:
            break
    os.waitpid(process, 0)
    return output.decode(errors="replace")


def main() -> None:
    path, words, *command = sys.argv[1:]
    text = Text.from_ansi("\n".join(screen_of(shown(words, command))).rstrip())
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(text)
    # The reader's own fonts: a page of documentation loads nothing from elsewhere.
    form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    form = form.replace("Fira Code, monospace", "ui-monospace, DejaVu Sans Mono, Menlo, Consolas, monospace")
    svg = console.export_svg(title=f"mtl {' '.join(command[:2])}", code_format=form, unique_id="terminal")
    with open(path, "w", encoding="utf-8") as file:
        file.write(svg)


if __name__ == "__main__":
    main()
