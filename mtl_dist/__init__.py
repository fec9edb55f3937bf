"""Train one vision model for many tasks on sharded data, on any number of ranks."""

__version__ = "0.1.0"
