"""The errors that ray_sd raises on purpose. All carry one message, so they survive pickling across Ray."""


class RaySdError(Exception):
    """Base of every error whose message is written for the person who runs the command."""


class ConfigError(RaySdError):
    """The configuration cannot be run as written; raised before anything is encoded, drawn or trained."""


class RequestError(RaySdError):
    """One request asks for what cannot be drawn; others beside it can."""

    def __init__(self, *args: str, param: str | None = None) -> None:
        """param: the field of the request that is wrong."""
        super().__init__(*args)
        self.param = param


class DataError(RaySdError):
    """The data cannot be read, or too much of it was rejected."""


class ArtifactError(RaySdError):
    """A model folder, an adapter or a checkpoint is missing a part, damaged, or made for something else."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
