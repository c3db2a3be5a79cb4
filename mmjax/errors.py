"""Errors that the user can fix; the command line prints them in one line, without a traceback."""


class UserError(Exception):
    """A fault in the data, the config or the command: the message names file, line or key.

    reason: a short key under which a faulty row is counted.
    """

    reason = 'invalid_record'


class RecordError(UserError):
    """A fault of one record: `reason` is a short key for counting, the message names the file."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return RecordError, (self.reason, str(self))
