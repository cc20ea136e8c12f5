"""How a command ends that did not finish: its exit code, and the exception that stands for it."""

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h


class Resumable(Exception):
    """The command stopped in order and goes on when it is started again."""
