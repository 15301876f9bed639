"""Every error the system raises on purpose, with the exit code of the command line.

A message says what was found, what was wanted and what to do next. No public operation returns None for failure.

    RecsysError           1  unexpected
    |-- ConfigError       2  an invalid configuration or command line
    |-- DataError         3  files, rows or bundles that are not what they should be
    |   `-- BundleError   3  a bundle that is damaged, of another format, or answers differently than when published
    |-- StoreError        1  a store of live histories that is unavailable for now
    |-- PartError         1  a deployment of the split topology that did not answer
    |-- GateError         4  a check the user asked for did not pass
    `-- RequestError      -  a request the service refuses; carries the HTTP status and a stable code
"""


class RecsysError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class ConfigError(RecsysError):
    """The configuration or the command line is invalid."""

    exit_code = 2


class DataError(RecsysError):
    """A file, a row or a prepared set is not what it should be."""

    exit_code = 3


class BundleError(DataError):
    """A bundle is damaged, of an unknown format, or does not answer as it did when it was published."""


class StoreError(RecsysError):
    """A store of live histories is unavailable for now: it is damaged, or its server is gone."""


class GateError(RecsysError):
    """A check the user asked for did not pass."""

    exit_code = 4


class PartError(RecsysError):
    """A deployment of the split topology did not answer: it is being replaced, or late."""


class RequestError(RecsysError):
    """A request the service refuses.

    Args:
        status: the HTTP status, e.g. 413.
        code: a stable machine-readable code, e.g. `too_many_candidates`.
        message: what was found and what is wanted.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    def __reduce__(self) -> tuple[type["RequestError"], tuple[int, str, str]]:
        """Let a refusal cross processes: an exception is made again from `args`, which hold the message alone."""
        return RequestError, (self.status, self.code, str(self))
