"""minilm: a small transformer and Mixture-of-Experts in plain PyTorch. The core knows nothing of
any paper."""

__version__ = "0.2.0"


class InputError(ValueError):
    """A user's mistake: the message is one line that says what was given, what is needed and what
    to do.

    `minilm.results.cli` prints it without a traceback and exits with status 2."""
