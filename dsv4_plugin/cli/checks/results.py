"""The results file of a command: complete JSON at any moment, also when the run is killed."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from dsv4_plugin.cli.shared import outputs
from dsv4_plugin.cli.shared.run import UsageError, lost_signals
from dsv4_plugin.errors import SettingError, UnmetError

__all__ = ["Results"]

SAVE_EVERY_S = 2.0


class Results:
    """A results document and the file that it is kept in, if any.

    The file is written at once, with ``complete`` false, so that a file that cannot be written
    stops the command before the work begins. In a ``with`` block the file gets all results so far,
    however the block ends. If the run is refused before it saved anything, the file keeps its old
    content.

    Raises:
        UsageError: the file cannot be written.
    """

    def __init__(self, document: dict[str, Any], file: Path | None) -> None:
        self.document, self.file, self._saved, self._began = document, file, 0.0, False
        document.setdefault("complete", False)
        try:
            self._before = file.read_bytes() if file and file.is_file() else None
            self.save(now=True)
            self._began = False
        except OSError as error:
            raise UsageError(f"--json cannot be written: {error}") from error

    def save(self, *, now: bool = False) -> None:
        """Write the file unless it was just written; ``now``: in any case.

        A pipe or a device takes only one document, so it is written at the end.
        """
        lost_signals()
        self._began = True
        if not self.file or outputs.is_stream(self.file):
            return
        if now or time.monotonic() - self._saved > SAVE_EVERY_S:
            outputs.write(self.file, outputs.text_of(self.document))
            self._saved = time.monotonic()

    def said(self) -> str:
        """Return where the results are, for the last line of an interrupted run."""
        return (
            f"the results so far were written to {self.file}"
            if self.file
            else "nothing was written"
        )

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.file is None:
            return
        refused = isinstance(error, (UsageError, SettingError, UnmetError)) and not self._began
        if not refused:
            outputs.write(self.file, outputs.text_of(self.document))
        elif not outputs.is_stream(self.file):
            if self._before is None:
                self.file.unlink(missing_ok=True)
            else:
                self.file.write_bytes(self._before)
