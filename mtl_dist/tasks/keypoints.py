"""Keypoints: places by name. Target float32 (B, K + 3, 3), see `kinds.keypoints`; a loss sees (B, K, 3): x, y
and visibility, where -1 and 1 are the edges of the view and visibility 0 is no label.

Output (B, 2 K), x and y of each point; or heat maps (B, K, h, w) of any size: a softmax has its mean there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
from pydantic import Field

from mtl_dist.config.settings import Settings
from mtl_dist.errors import UserError
from mtl_dist.kinds.keypoints import mean_positions, swapped_names
from mtl_dist.lazy import F, torch
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.metrics import TaskMetrics
from mtl_dist.tasks.resampling import of_pixels
from mtl_dist.tasks.task import (
    MADE_SIZE,
    NUM_MADE,
    USER_LOSS,
    Baseline,
    CommonTaskSettings,
    Loss,
    LossSettings,
    Mode,
    Task,
    made,
    require_fit,
)

if TYPE_CHECKING:
    from torch import Tensor

Head: TypeAlias = Literal["heatmap", "regression"]
Reference: TypeAlias = Literal["diagonal", "extent"] | tuple[str, str]

_FINEST = 64  # cells of the heat map that answers with the mean positions
_NEVER = -1e4
_NEAR = 1  # cells around a point in which a heat map is sure of it


class _PointLossSettings(LossSettings):
    @abstractmethod
    def points(self) -> PointLoss:
        """The loss of coordinates."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        return CoordinateLoss(len(info.classes), self.points())


class KeypointsL1Settings(_PointLossSettings):
    """The absolute difference of the coordinates."""

    kind: Literal["l1"] = "l1"

    def points(self) -> PointLoss:
        return PointLoss("l1")


class KeypointsMseSettings(_PointLossSettings):
    """The squared difference of the coordinates."""

    kind: Literal["mse"] = "mse"

    def points(self) -> PointLoss:
        return PointLoss("mse")


class KeypointsSmoothL1Settings(_PointLossSettings):
    """Squared up to `beta`, absolute beyond, as `torch.nn.SmoothL1Loss` has it."""

    kind: Literal["smooth_l1"] = "smooth_l1"
    beta: Annotated[float, Field(gt=0)] = 0.05
    """Where it turns; the width of the view is 2."""

    def points(self) -> PointLoss:
        return PointLoss("smooth_l1", self.beta)


KeypointsLoss: TypeAlias = Annotated[
    KeypointsL1Settings | KeypointsMseSettings | KeypointsSmoothL1Settings,
    Field(discriminator="kind"),
    USER_LOSS,
]


class HeatmapShape(Settings):
    """What a heat map is to look like: a Gaussian at the point (Nibali et al. 2018,
    https://arxiv.org/abs/1801.07372)."""

    kind: Literal["js", "mse"] = "js"
    """The Jensen-Shannon divergence from it, or the squared difference, summed over the cells."""
    weight: Annotated[float, Field(ge=0)] = 0.1
    """Beside the loss of the coordinates; 0 leaves the shape alone."""
    sigma: Annotated[float, Field(gt=0)] = 1.0
    """The Gaussian's deviation, in cells of the heat map."""


class KeypointsSettings(CommonTaskSettings):
    """A task with a place in the image for each of its points."""

    modes: ClassVar[Mapping[str, Mode]] = {"nme": "min", "pck": "max", "pixel_error": "min"}
    compared: ClassVar[tuple[str, ...]] = ("nme", "pck")
    learnt_by_heart: ClassVar[tuple[str, float]] = ("pck", 0.9)
    if_not_learnt: ClassVar[str] = (
        "Look in the picture whether the points lie where they should, and at the names that a flip exchanges"
    )

    kind: Literal["keypoints"] = "keypoints"
    head: Head = "heatmap"
    """`heatmap`: a map for each point over the decoder's features, whose softmax has its mean at the point
    (soft-argmax; Sun et al. 2018, https://arxiv.org/abs/1711.08229); `regression`: numbers from the features'
    vector."""
    loss: KeypointsLoss = KeypointsL1Settings()
    shape: HeatmapShape = HeatmapShape()
    """What the heat maps are to look like beside that."""
    reference: Reference = "diagonal"
    """The length that errors are measured by: the `diagonal` of the image, the `extent` of the labelled
    points (the longer side of the box around them), or the distance of two, as [left_eye, right_eye]."""
    alpha: Annotated[float, Field(gt=0)] = 0.05
    """A point is right, in pck, that is no farther off than this share of the reference length."""

    def build(self, name: str, info: TaskInfo) -> Task:
        require_fit(name, self.kind, info, 1)
        where = f"tasks.{name}"
        if isinstance(self.reference, tuple):
            for point in self.reference:
                if point not in info.classes:
                    raise UserError(
                        f"{where}.reference: expected diagonal, extent or two of the points "
                        f"{', '.join(info.classes)}, found {point!r}."
                    )
        # Not whether it was stated: the recipe of a run states everything.
        if self.head == "regression" and self.shape != HeatmapShape():
            raise UserError(
                f"{where}.shape: expected none with head: regression, which has no heat map. Remove it."
            )
        loss = self.loss.build(info, f"{where}.loss")
        if self.head == "regression":
            return RegressionPointsTask(name, info, self, loss)
        if isinstance(loss, CoordinateLoss):
            loss = HeatmapLoss(loss.num_points, loss.points, self.shape)
        return HeatmapTask(name, info, self, loss)


@dataclass(frozen=True)
class PointLoss:
    """The loss of a point: the mean of that of x and that of y."""

    kind: Literal["l1", "mse", "smooth_l1"]
    beta: float = 1.0

    def __call__(self, points_BK2: Tensor, target_BK3: Tensor) -> Tensor:
        """Of each point, (B, K); 0 where there is no label."""
        there_BK = target_BK3[..., 2] > 0
        points_BK2 = torch.where(there_BK[..., None], points_BK2, 0.0)
        wanted_BK2 = torch.where(there_BK[..., None], target_BK3[..., :2], 0.0)
        if self.kind == "l1":
            losses = F.l1_loss(points_BK2, wanted_BK2, reduction="none")
        elif self.kind == "mse":
            losses = F.mse_loss(points_BK2, wanted_BK2, reduction="none")
        else:
            losses = F.smooth_l1_loss(points_BK2, wanted_BK2, reduction="none", beta=self.beta)
        return losses.mean(dim=2)


@dataclass(frozen=True)
class CoordinateLoss(Loss):
    """A loss of coordinates, over the points that have a label."""

    num_points: int
    points: PointLoss

    @property
    def num_outputs(self) -> int:
        return 2 * self.num_points

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        return self.points(output.unflatten(1, (self.num_points, 2)), target).sum(dim=1)

    def denominators(self, target: Tensor) -> Tensor:
        return (target[..., 2] > 0).sum(dim=1, dtype=torch.float32)


@dataclass(frozen=True)
class HeatmapLoss(CoordinateLoss):
    """The same of the means of heat maps, with what these are to look like."""

    shape: HeatmapShape

    @property
    def num_outputs(self) -> int:
        return self.num_points

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        losses_BK = self.points(soft_argmax(output), target)
        if self.shape.weight:
            there_BK = target[..., 2] > 0
            unlike_BK = _unlike(output, target, self.shape)
            losses_BK = losses_BK + self.shape.weight * torch.where(there_BK, unlike_BK, 0.0)
        return losses_BK.sum(dim=1)


def soft_argmax(maps_BKHW: Tensor) -> Tensor:
    """The mean place (x, y) of the softmax of each map, (B, K, 2); -1 and 1 are the map's edges."""
    height, width = maps_BKHW.shape[-2:]
    shares_BKHW = maps_BKHW.flatten(2).softmax(dim=2).view_as(maps_BKHW)
    x_BK = (shares_BKHW.sum(dim=2) * _centres(width, maps_BKHW)).sum(dim=2)
    y_BK = (shares_BKHW.sum(dim=3) * _centres(height, maps_BKHW)).sum(dim=2)
    return torch.stack([x_BK, y_BK], dim=2)


def _centres(number: int, like: Tensor) -> Tensor:
    """The centres of so many cells, of which the first begins at -1 and the last ends at 1."""
    return (2 * torch.arange(number, device=like.device, dtype=like.dtype) + 1) / number - 1


def _unlike(maps_BKHW: Tensor, target_BK3: Tensor, shape: HeatmapShape) -> Tensor:
    """How far the softmax of each map is from a Gaussian at its point, (B, K)."""
    height, width = maps_BKHW.shape[-2:]
    away_x = (_centres(width, maps_BKHW) - target_BK3[..., :1]) * width / (2 * shape.sigma)
    away_y = (_centres(height, maps_BKHW) - target_BK3[..., 1:2]) * height / (2 * shape.sigma)
    wanted = -(away_y[..., :, None].square() + away_x[..., None, :].square()) / 2
    logs_p, logs_q = maps_BKHW.flatten(2).log_softmax(dim=2), wanted.flatten(2).log_softmax(dim=2)
    if shape.kind == "mse":
        return (logs_p.exp() - logs_q.exp()).square().sum(dim=2)
    logs_m = torch.logaddexp(logs_p, logs_q) - math.log(2)
    return (logs_p.exp() * (logs_p - logs_m) + logs_q.exp() * (logs_q - logs_m)).sum(dim=2) / 2


class KeypointsTask(Task, ABC):
    """A place for each point."""

    settings: KeypointsSettings
    answers_pixels: ClassVar[bool] = False

    @abstractmethod
    def read(self, output: Tensor) -> Tensor:
        """The points (B, K, 2) in outputs, float64; -1 and 1 are the edges of the view."""

    def confidences(self, output: Tensor) -> Tensor | None:
        """How sure the output is of each point, (B, K) from 0 to 1, where it can say that."""
        return None

    def notes(self) -> list[str]:
        """Which names a flip exchanges, where that is not stated."""
        if "swap" in self.info.facts:
            return []
        pairs = swapped_names(self.info)
        said = ", ".join(f"{one} and {other}" for one, other in pairs) if pairs else "no names"
        otherwise = f"data.facts.{self.name}.swap says otherwise"
        return [f"a flip of left and right exchanges {said}; {otherwise}"]

    def metrics(self, ranking: bool = True, choosing: bool = False) -> TaskMetrics:
        from mtl_dist.tasks.keypoint_metrics import KeypointMetrics  # imports torch

        return KeypointMetrics(self.read, self.info.classes, self.settings.reference, self.settings.alpha)

    def decode(self, output: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
        """Per sample the `points` by name: x, y, and of heat maps the `confidence`, the share of the map in
        the 3 x 3 cells around it. -1 and 1 are the edges of the view, until `placed` has been asked."""
        places_BK2 = self.read(output.detach()).tolist()
        sure_BK = self.confidences(output.detach())
        answers = []
        for row, places in enumerate(places_BK2):
            points = {name: {"x": x, "y": y} for name, (x, y) in zip(self.info.classes, places, strict=True)}
            if sure_BK is not None:
                for point, sure in zip(points.values(), sure_BK[row].tolist(), strict=True):
                    point["confidence"] = sure
            answers.append({"points": points})
        return answers

    def placed(self, answer: dict[str, Any], target: np.ndarray) -> dict[str, Any]:
        """In pixels of the image as it came; (0, 0) is the centre of the first one."""
        to_image = target[-3:-1].astype(np.float64)
        points = {}
        for name, point in answer["points"].items():
            x, y = (to_image @ [point["x"], point["y"], 1]).tolist()
            points[name] = {**point, "x": x, "y": y}
        return {**answer, "points": points}

    def drawn(self, answer: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        points = [[point["x"], point["y"], 2] for point in answer["points"].values()]
        return {"points": points, "size": [size[1], size[0]]}

    def judged(self, answer: Mapping[str, Any], output: Tensor, target: Tensor) -> dict[str, Any]:
        """The `label` of each point that has one, its `error` in pixels, the sample's own metrics, and how
        many points these are over: `num_points`, and with a reference length `num_referenced`."""
        from mtl_dist.tasks.keypoint_metrics import KeypointMetrics, errors

        of_one = KeypointMetrics(self.read, self.info.classes, self.settings.reference, self.settings.alpha)
        values = of_one.to(output.device).of_one(output, target)
        there = (target[0, :-3, 2] > 0).tolist()
        places = target.double()
        wanted = (places[0, :-3, :2] @ places[0, -3:-1, :2].T + places[0, -3:-1, 2]).tolist()
        apart = errors(self.read(output), target)[0].tolist()
        named = list(zip(self.info.classes, there, wanted, apart, strict=True))
        return {
            **{name: values[name] for name in self.settings.modes},
            "num_points": int(of_one.counts[0].sum()),
            "num_referenced": int(of_one.counts[1].sum()),
            "label": {name: {"x": place[0], "y": place[1]} for name, has, place, _ in named if has},
            "error": {name: error for name, has, _, error in named if has},
        }

    def resampled(
        self, columns: Mapping[str, np.ndarray], weights_RN: np.ndarray, ranking: bool = True
    ) -> dict[str, np.ndarray]:
        found = of_pixels(columns, ["nme", "pck"], "num_referenced", weights_RN)
        return found | of_pixels(columns, ["pixel_error"], "num_points", weights_RN)

    def loss_target(self, target: Tensor, labelled_B: Tensor) -> Tensor:
        """The points alone: (B, K, 3)."""
        return super().loss_target(target, labelled_B)[:, :-3]

    def metric_inputs(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Points (B, K, 2), and those of the targets (B, K, 3); -1 and 1 are the edges of the view."""
        return self.read(output).float(), target[:, :-3]

    def _made_target(self) -> Tensor:
        target = torch.zeros(NUM_MADE, len(self.info.classes) + 3, 3)
        target[:, :-3, :2] = made(NUM_MADE, len(self.info.classes), 2).tanh().roll(1, dims=0)
        target[:, :-3, 2] = 2
        target[:, -3:] = torch.tensor(
            [[MADE_SIZE, 0, 0], [0, MADE_SIZE, 0], [2 * MADE_SIZE, 2 * MADE_SIZE, 0]]
        )
        return target


class RegressionPointsTask(KeypointsTask):
    """Points from numbers: x and y of each."""

    @property
    def allowed_outputs(self) -> tuple[int, ...]:
        return (2 * len(self.info.classes),)

    def read(self, output: Tensor) -> Tensor:
        return output.double().unflatten(1, (len(self.info.classes), 2))

    def example(self) -> tuple[Tensor, Tensor]:
        return made(NUM_MADE, 2 * len(self.info.classes)), self._made_target()

    def baseline(self) -> Baseline | None:
        """The mean place of each point in training."""
        means = mean_positions(self.info)
        return None if means is None else Baseline("mean", torch.from_numpy(means).float().flatten())


class HeatmapTask(KeypointsTask):
    """Points from a map for each."""

    layout: ClassVar[Literal["vector", "map"]] = "map"

    @property
    def allowed_outputs(self) -> tuple[int, ...]:
        return (len(self.info.classes),)

    def read(self, output: Tensor) -> Tensor:
        return soft_argmax(output.double())

    def confidences(self, output: Tensor) -> Tensor:
        maps_BKHW = output.double()
        height, width = maps_BKHW.shape[-2:]
        shares_BKHW = maps_BKHW.flatten(2).softmax(dim=2).view_as(maps_BKHW)
        places_BK2 = soft_argmax(maps_BKHW)
        near = torch.ones_like(shares_BKHW, dtype=torch.bool)
        for axis, number, place_BK in ((3, width, places_BK2[..., 0]), (2, height, places_BK2[..., 1])):
            cell_BK = ((place_BK + 1) * number / 2).floor().clamp(0, number - 1)
            away = (torch.arange(number, device=output.device) - cell_BK[..., None]).abs() <= _NEAR
            near = near & (away[..., None, :] if axis == 3 else away[..., :, None])
        return torch.where(near, shares_BKHW, 0.0).sum(dim=(2, 3))

    def example(self) -> tuple[Tensor, Tensor]:
        return made(NUM_MADE, len(self.info.classes), MADE_SIZE, MADE_SIZE), self._made_target()

    def baseline(self) -> Baseline | None:
        """The mean place of each point in training, as maps of which it is the mean."""
        means = mean_positions(self.info)
        if means is None:
            return None
        cells_K2 = ((means + 1) * _FINEST / 2 - 0.5).clip(0, _FINEST - 1)
        weights = np.maximum(0, 1 - np.abs(np.arange(_FINEST) - cells_K2[..., None]))
        shares = weights[:, 1, :, None] * weights[:, 0, None, :]
        logs = np.log(np.maximum(shares, 1e-300))
        return Baseline("mean", torch.from_numpy(np.maximum(logs, _NEVER)).float())

    def _safe_output(self, output: Tensor, safe_target: Tensor, labelled_B: Tensor) -> Tensor:
        """The maps, flat where their point has no label."""
        return torch.where((safe_target[..., 2] > 0)[..., None, None], output, 0.0)
