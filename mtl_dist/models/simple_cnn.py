"""A small convolutional network for small images (digits, CIFAR)."""

from __future__ import annotations

from torch import Tensor, nn

from mtl_dist.errors import UserError


class SimpleCNN(nn.Module):
    """Two 3x3 convolutions (32 and 64 channels), each with ReLU and pooling, and a hidden layer of 128.

    It has no normalisation layers, and its size follows the image's: 28 x 28 grey images and heads of
    10 + 5 + 3 classes make 422,674 parameters. Maps stand at strides 1 (32 channels), 2 and 4 (64 channels).
    """

    def __init__(self, in_channels: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        height, width = image_size
        if min(height, width) < 4:
            raise UserError(
                "model.backbone: simple_cnn expected images of at least 4 x 4 pixels, "
                f"found {height} x {width}. "
                "Choose a larger data.image_size."
            )
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.hidden = nn.Linear(64 * (height // 4) * (width // 4), 128)
        self.dropout = nn.Dropout(0.25)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The features (B, 128)."""
        half_BDHW = self.pool(self.relu(self.conv1(images_BCHW)))
        quarter_BDHW = self.pool(self.relu(self.conv2(half_BDHW)))
        return self.dropout(self.relu(self.hidden(self.flatten(quarter_BDHW))))
