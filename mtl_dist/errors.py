"""The exceptions that mean: the user can fix this."""


class UserError(ValueError):
    """A mistake in what the user gave: one or more clear lines, exit code 2, no traceback.

    Each line says what was expected, what was found and what to do:
    ``tasks.depth.weight: expected a number >= 0, found -1. Remove the task to switch it off.``
    """


class NotInstalledError(UserError):
    """A package of an extra is not there."""


class ImageError(UserError):
    """The image that was given cannot be read or does not suit the model: whoever sent it can fix it."""
