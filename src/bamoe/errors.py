"""The errors a user can cause. The command line prints them as one message; anything else is a bug."""


class BamoeError(ValueError):
    """Something the user can mend; the message has the values seen and what to do."""


class ConfigError(BamoeError):
    """A recipe, a training config or a command-line argument that cannot be honoured."""


class CheckpointError(BamoeError):
    """A checkpoint that is missing, truncated, incomplete or not readable."""


class CompatibilityError(BamoeError):
    """Checkpoints that cannot become one mixture; lists every problem found."""


class DataError(BamoeError):
    """A corpus that is missing, empty or of an unknown kind."""
