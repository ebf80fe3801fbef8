"""``dsv4-plugin ab``: compare two servers with the engine's own benchmark client.

:mod:`.command` has the options and :mod:`.experiment` the order of the steps. :mod:`.servers` and
:mod:`.clients` start the programs. :mod:`.engagement` finds out whether the plugin was at work.
:mod:`.intervals` has the statistics, :mod:`.report` and :mod:`.plot` the output. Nothing here
imports torch or an engine. docs/ab.md says what is measured and why.
"""

__all__ = ["AbError", "Interrupted", "Refused"]


class AbError(Exception):
    """A server or a client did not do what it was started for."""

    exit_code = 1


class Refused(AbError):
    """The runs went well, but they do not compare what they claim to, so they are not reported."""

    exit_code = 3


class Interrupted(AbError):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted; what was started has been stopped")
        self.exit_code = 128 + number
