"""Which frames of a stack are taken: `all`, `every:5`, `10:40`, `first,last`."""

from __future__ import annotations

import re

from mtl_dist.errors import UserError
from mtl_dist.plural import plural


def chosen_frames(policy: str, num_frames: int, where: str) -> list[int]:
    """The frames, from 0, in ascending order.

    all         every one
    every:N     0, N, 2N, ...
    A:B         from A up to before B, as far as there are; either may be left out
    A,B,...     these, where `first` and `last` are words for them

    Raises:
        UserError: another policy, or one that takes no frame of this stack or one that it lacks.
    """
    text = policy.replace(" ", "")
    frames: list[int] | None = None
    every = re.fullmatch(r"every:([1-9]\d*)", text)
    between = re.fullmatch(r"(\d*):(\d*)", text)
    if text == "all":
        frames = list(range(num_frames))
    elif every:
        frames = list(range(0, num_frames, int(every[1])))
    elif between and text != ":":
        frames = list(range(num_frames))[int(between[1] or 0) : int(between[2] or num_frames)]
    elif re.fullmatch(r"(?:first|last|\d+)(?:,(?:first|last|\d+))*", text):
        words = {"first": 0, "last": num_frames - 1}
        frames = sorted({words[word] if word in words else int(word) for word in text.split(",")})
    if frames is None:
        raise UserError(
            f"--frames: expected all, every:N, A:B or pages such as first,10,last, found {policy!r}."
        )
    if not frames or frames[-1] >= num_frames:
        raise UserError(
            f"{where}: expected the frames {policy}, found {plural(num_frames, 'page')} "
            f"(0 to {num_frames - 1})."
        )
    return frames
