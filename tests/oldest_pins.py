"""The oldest releases that setup.cfg allows, as pins for pip: `python tests/oldest_pins.py > pins.txt`.

`numpy>=1.26` becomes `numpy==1.26.*`: the bound's own series, in which the first file may be a later patch.
Of the extras those that `make test` installs and that the package itself uses.
"""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

EXTRAS = ("adapters", "decoders", "demo", "fast", "parquet", "tiff", "timm")
OF_THEIR_TIME = ("click==8.2.*",)
"""What is not required, but by those: the oldest Typer loses the help of arguments under today's Click."""


def pins(setup: Path) -> list[str]:
    """One pin for each requirement with a lower bound."""
    settings = ConfigParser()
    settings.read(setup)
    requirements = [settings["options"]["install_requires"]]
    requirements += [settings["options.extras_require"][extra] for extra in EXTRAS]
    lines = [line.strip() for text in requirements for line in text.splitlines()]
    bounded = [line.split(">=") for line in lines if ">=" in line]
    return [*(f"{name}=={bound}.*" for name, bound in bounded), *OF_THEIR_TIME]


if __name__ == "__main__":
    print("\n".join(pins(Path(__file__).parents[1] / "setup.cfg")))
