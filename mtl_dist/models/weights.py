"""Pretrained weights for a backbone: from torchvision's registry or from a file."""

from __future__ import annotations

import http.client
import pickle
import re
from collections.abc import Callable, Collection
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from mtl_dist.errors import UserError
from mtl_dist.plural import first_few
from mtl_dist.tensor_files import read_tensors

_AUXILIARY = {"AuxLogits", "aux1", "aux2"}
"""Auxiliary classifiers in published weights of inception_v3 and googlenet."""

_OF_A_RUN = "model.backbone."
"""How the names of a shared backbone begin in a run's checkpoints/step_N/model.safetensors."""

_NETWORK, _PYRAMID = "network.", "pyramid."
"""How those of a backbone of timm begin in there."""

_BASE = ".base_layer."
_ADAPTER = re.compile(r"\.lora_[AB]\.")
"""How an adapter (adapters.py) names what it is beside, and itself."""

_OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def load_weights(module: nn.Module, trunk: Collection[str], name: str, source: str) -> None:
    """Load `source` into those children and parameters of `module` that `trunk` names.

    `module` is torchvision's model `name`, whole; what it holds beside the trunk is its classifier, whose
    weights are ignored. The first convolution's weights are fitted to `module`'s number of channels.

    Raises:
        UserError: no such file, not a state dict, or one of another network.
    """
    state = _published_weights(name) if source == "torchvision" else read_state_dict(Path(source))
    state = _shared_backbone(state)
    state = {_OLD_DENSENET_NAME.sub(r"\1\2", key): value for key, value in state.items()}
    if isinstance(module, VisionTransformer) and "encoder.pos_embedding" in state:
        state = dict(interpolate_embeddings(module.image_size, module.patch_size, state))
    ignored = _AUXILIARY | ({child for child, _ in module.named_children()} - set(trunk))
    found = {key: value for key, value in state.items() if key.split(".")[0] not in ignored}
    expected = {key: value for key, value in module.state_dict().items() if key.split(".")[0] in trunk}
    _fit_first_convolution(found, module)
    _check(found, expected, name, source)
    module.load_state_dict(found, strict=False)


def load_timm_weights(
    module: nn.Module,
    pyramid: nn.Module,
    classifier: str | Collection[str],
    name: str,
    source: str | dict[str, Tensor],
    convert: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
) -> None:
    """Load a file, or tensors, into a network of timm.

    Args:
        classifier: how the names of the classifier's weights begin, which are ignored
        pyramid: takes its weights from the checkpoint of a run
        convert: brings what was published to `module`'s names and sizes

    Raises:
        UserError: no such file, not a state dict, or one of another network.
    """
    state = _shared_backbone(read_state_dict(Path(source)) if isinstance(source, str) else source)
    made = {key.removeprefix(_PYRAMID): value for key, value in state.items() if key.startswith(_PYRAMID)}
    own = {key.removeprefix(_NETWORK): value for key, value in state.items() if key not in made}
    own = {key: value for key, value in own.items() if not key.startswith(_PYRAMID)}
    where = source if isinstance(source, str) else "what timm has of it"
    try:
        converted = convert(own, module)
    except (KeyError, IndexError, RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(
            f"model.weights: expected the weights of {name} in {where}, found names or sizes that timm can't "
            f"convert ({type(error).__name__}: {error}). Give a file of this very network."
        ) from None
    expected = module.state_dict()
    parts = [classifier] if isinstance(classifier, str) else classifier
    ignored = tuple(f"{part}." for part in parts)
    found = {key: value for key, value in converted.items() if not key.startswith(ignored)}
    _fit_first_convolution(found, module)
    _check(found, expected, name, where)
    module.load_state_dict(found, strict=False)
    if made:
        levels = {key: value for key, value in pyramid.state_dict().items() if key in made}
        _check(made, {**pyramid.state_dict(), **levels}, f"{name}'s pyramid", where)
        pyramid.load_state_dict(made)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return _ADAPTER.search(name) is not None


def without_base(name: str) -> str:
    """The name that a parameter beside an adapter has where there is none."""
    return name.replace(_BASE, ".")


def _shared_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's weights out of a checkpoint of a run; any other state as it is.

    Raises:
        UserError: of a run with an adapter.
    """
    if any(map(is_adapter, state)):
        raise UserError(
            "model.weights: expected the weights of a network, found those of a run with model.adapter "
            "beside them. Merge them: mtl export RUN --format safetensors."
        )
    own = {key.removeprefix(_OF_A_RUN): value for key, value in state.items() if key.startswith(_OF_A_RUN)}
    return own or state


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file or in one that `torch.save` wrote; nothing else is unpickled."""
    if not path.is_file():
        raise UserError(
            f"model.weights: expected a file, 'torchvision' or 'timm', found no file {path}. Check the path."
        )
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file that is no pickle whatever its bytes happen to mean
        raise UserError(
            f"model.weights: expected tensors in {path}, found a file that can't be read ({_why(error)}). "
            "Save a plain state dict: torch.save(model.state_dict(), path)."
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        what = (
            f"the keys {first_few(list(map(str, state)))}"
            if isinstance(state, dict)
            else type(state).__name__
        )
        raise UserError(
            f"model.weights: expected names and tensors in {path}, found {what}. "
            "Save the plain state dict alone: torch.save(model.state_dict(), path)."
        )
    return state


def _why(error: Exception) -> str:
    """In a few words why a file cannot be read: torch's own advice is to trust it."""
    text = str(error)
    code = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", text)
    if code is not None:
        return f"more than tensors: {code[1]}"
    if isinstance(error, UserError):
        return text.partition("\n")[0]
    if isinstance(error, EOFError) or "PytorchStreamReader" in text:
        return "empty, cut short or damaged"
    if isinstance(error, pickle.UnpicklingError | KeyError | IndexError):
        return "neither a zip of torch.save nor a pickle"
    return f"{type(error).__name__}: {text}".partition("\n")[0]


def input_convolution(module: nn.Module) -> tuple[str, nn.Conv2d]:
    """The first convolution, which reads the image: its path and itself."""
    return next((name, part) for name, part in module.named_modules() if isinstance(part, nn.Conv2d))


def fit_channels(weight_OCHW: Tensor, in_channels: int) -> Tensor:
    """A first convolution's weight for `in_channels` channels instead of its own.

    One channel gets the sum over the channels, so a grey image gives what it gave as RGB. More channels
    repeat them in turn, scaled to keep the activations' size.
    """
    own = weight_OCHW.shape[1]
    if in_channels == 1:
        return weight_OCHW.sum(dim=1, keepdim=True)
    order = torch.arange(in_channels) % own
    return weight_OCHW[:, order] * (own / in_channels)


def _published_weights(name: str) -> dict[str, Tensor]:
    try:
        return dict(torchvision.models.get_model(name, weights="DEFAULT", progress=False).state_dict())
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise UserError(
            f"model.weights: expected to download torchvision's weights of {name}, found: {error}. "
            "Fetch the file on a machine with a connection and give its path."
        ) from None


def _fit_first_convolution(found: dict[str, Tensor], module: nn.Module) -> None:
    """Fit the file's weights for three channels to the channels that the module reads."""
    path, conv = input_convolution(module)
    weight = found.get(f"{path}.weight")
    if weight is not None and weight.dim() == 4 and weight.shape[1] == 3 != conv.in_channels:
        found[f"{path}.weight"] = fit_channels(weight, conv.in_channels)


def _check(found: dict[str, Tensor], expected: dict[str, Tensor], name: str, source: str) -> None:
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    both = found.keys() & expected.keys()
    problems = {
        "missing": expected.keys() - found.keys() - counters,
        "unexpected": found.keys() - expected.keys(),
        "of another shape": {
            f"{key} {tuple(found[key].shape)}, not {tuple(expected[key].shape)}"
            for key in both
            if found[key].shape != expected[key].shape
        },
    }
    listed = [f"{what}: {first_few(sorted(keys))}" for what, keys in problems.items() if keys]
    if listed:
        raise UserError(
            f"model.weights: expected the weights of {name} in {source}, found {'; '.join(listed)}. "
            "Give a file of this very network, named as its library names it."
        )
