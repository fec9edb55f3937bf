"""timm's registry: networks by name, their published weights and what those expect."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any, TypeAlias

from torch import Tensor, nn

from mtl_dist.config.nearest import nearest
from mtl_dist.errors import NotInstalledError, UserError
from mtl_dist.models.settings import TIMM

State: TypeAlias = dict[str, Tensor]

_HUB_TIMEOUT_S = 10.0


def is_timm(name: str) -> bool:
    """Whether a backbone's name is one of timm: `timm/convnext_atto`."""
    return name.startswith(TIMM)


def timm_library() -> ModuleType:
    """timm, imported when something of it is first used.

    Raises:
        UserError: it is not installed.
    """
    try:
        import timm
    except ImportError:
        raise NotInstalledError(
            "model.backbone: expected timm, which has the network, found it not installed. "
            "Install it: pip install 'mtl-dist[timm]'."
        ) from None
    return timm


def configuration(name: str) -> Mapping[str, Any]:
    """What timm knows of the network: mean and std of its images, its classifier, where its weights lie.

    Raises:
        UserError: timm has no such network, or no such weights of it.
    """
    timm = timm_library()
    own = name.removeprefix(TIMM)
    architecture, _, tag = own.partition(".")
    if not timm.is_model(architecture):
        near = nearest(architecture, timm.list_models())
        hint = f"Did you mean {TIMM}{near}?" if near else "timm.list_models() has them all."
        raise UserError(f"model.backbone: expected {TIMM} and a network of timm, found {name!r}. {hint}")
    known = [one.partition(".")[2] for one in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in known:
        near = nearest(tag, known)
        hint = f"Did you mean {near}?" if near else "Leave it out."
        raise UserError(
            f"model.backbone: expected published weights of {architecture} ({', '.join(known) or 'none'}), "
            f"found {tag!r}. {hint}"
        )
    found: Mapping[str, Any] = timm.get_pretrained_cfg(own).to_dict()
    return found


def normalisation_of(name: str) -> tuple[list[float], list[float]]:
    """The mean and standard deviation, in 0 to 255, that the network's published weights expect."""
    config = configuration(name)
    return [255.0 * value for value in config["mean"]], [255.0 * value for value in config["std"]]


def create(name: str, arguments: Mapping[str, Any], optional: Collection[str] = ()) -> nn.Module | None:
    """The network, untrained; None where it does not know one of the `optional` arguments.

    Raises:
        UserError: it does not take an argument.
    """
    try:
        module: nn.Module = timm_library().create_model(name.removeprefix(TIMM), **arguments)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        if isinstance(error, TypeError) and any(repr(own) in str(error) for own in optional):
            return None
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"model.backbone: {name} can't be built ({reason}). Change data.image_size or "
            "model.timm.arguments."
        ) from None
    return module


def published_weights(name: str) -> State:
    """The weights from timm, which keeps what it fetched once.

    Raises:
        UserError: there are none, or no connection.
    """
    timm = timm_library()
    try:
        if hub_name := configuration(name).get("hf_hub_id"):
            _require_hub(hub_name)
        return dict(timm.create_model(name.removeprefix(TIMM), pretrained=True).state_dict())
    except Exception as error:  # the hub's library raises what its own libraries do
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"model.weights: expected timm to have the weights of {name} or to fetch them, found: {reason}. "
            "Fetch the file on a machine with a connection and give its path."
        ) from None


def _require_hub(hub_name: str) -> None:
    """Ask the hub once for what is not kept here: without a connection its library tries each file of a model
    for half a minute, and then does not say why."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import get_session

    repository, _, revision = hub_name.partition("@")
    try:
        snapshot_download(repository, revision=revision or None, local_files_only=True)
    except LocalEntryNotFoundError:
        get_session().head(HfApi().endpoint, timeout=_HUB_TIMEOUT_S)


def converter(name: str) -> Callable[[State, nn.Module], State]:
    """What brings published weights to the names and sizes of a module: position embeddings are resampled."""
    timm = timm_library()
    architecture = name.removeprefix(TIMM).partition(".")[0]
    home = sys.modules[timm.models.model_entrypoint(architecture).__module__]
    filtered = getattr(home, "checkpoint_filter_fn", None)

    def convert(state: State, module: nn.Module) -> State:
        return dict(filtered(dict(state), module)) if filtered is not None else state

    return convert
