"""``dsv4-plugin ab``: one server against another with the engine's own benchmark client.

:mod:`.command` has the options, :mod:`.experiment` the order of things, :mod:`.servers` and
:mod:`.clients` what is started, :mod:`.engagement` whether the plugin was at work,
:mod:`.intervals` the statistics, :mod:`.report` and :mod:`.plot` what comes out. Nothing here
imports torch or an engine. docs/ab.md says what is measured and why so.
"""

__all__ = ["AbError", "Interrupted", "Refused"]


class AbError(Exception):
    """A server or a client did not do what it was started for."""

    exit_code = 1


class Refused(AbError):
    """The runs went well and must not be reported: they do not compare what they claim to."""

    exit_code = 3


class Interrupted(AbError):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted; what was started has been stopped")
        self.exit_code = 128 + number
