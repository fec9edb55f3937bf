"""An exported folder on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from mtl_dist.errors import UserError
from mtl_dist.prediction.exported import CONFIG_FILE, WEIGHTS_FILE

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ("README.md", CONFIG_FILE, WEIGHTS_FILE)


def check_push(repository: str, format: str) -> None:
    """Refuse what cannot be uploaded before anything is made.

    Raises:
        UserError: another format than safetensors, or no name of a repository.
    """
    if format != "safetensors":
        raise UserError(f"--push-to: expected --format safetensors, found {format}.")
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"--push-to: expected USER/NAME, found {repository!r}.")


def push(folder: Path, repository: str, public: bool) -> str:
    """Upload card, description and weights, as the token of this machine may; where they are then.

    Raises:
        UserError: no token, no network, or no right to write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), allow_patterns=list(_FILES))
    except LocalTokenNotFoundError:
        raise UserError(
            f"--push-to {repository}: expected a token, found none. Log in with `hf auth login`; the "
            f"model is in {folder}."
        ) from None
    except Exception as error:  # without a connection, what the library's own libraries raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"--push-to {repository}: expected the hub to take it, found: {reason}. The model is in {folder}."
        ) from None
    return f"https://huggingface.co/{repository}"
