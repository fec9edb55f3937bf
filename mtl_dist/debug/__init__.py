"""`mtl train --debug`: what the model sees, whether gradients reach it, and whether it can learn a batch."""
