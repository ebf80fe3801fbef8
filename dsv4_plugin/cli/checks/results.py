"""The results file of a command: whole at any moment, also when the run is killed."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from dsv4_plugin.cli.shared import outputs
from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["Results"]

SAVE_EVERY_S = 2.0


class Results:
    """A results document and the file that it is kept in, if any.

    The file is written at once, with ``complete`` false, so what cannot be written is refused
    before the work begins. ``with`` it, the file has what there is however the block ends.

    Raises:
        UsageError: the file cannot be written.
    """

    def __init__(self, document: dict[str, Any], file: Path | None) -> None:
        self.document, self.file, self._saved = document, file, 0.0
        document.setdefault("complete", False)
        try:
            self.save(now=True)
        except OSError as error:
            raise UsageError(f"--json cannot be written: {error}") from error

    def save(self, *, now: bool = False) -> None:
        """Write the file, unless it was written a moment ago; ``now``: in any case.

        A pipe or a device takes one document only: :meth:`close` writes it.
        """
        if not self.file or outputs.is_stream(self.file):
            return
        if now or time.monotonic() - self._saved > SAVE_EVERY_S:
            outputs.write(self.file, outputs.text_of(self.document))
            self._saved = time.monotonic()

    def close(self) -> None:
        """Write the file for the last time."""
        if self.file:
            outputs.write(self.file, outputs.text_of(self.document))

    def said(self) -> str:
        """Return where it was written, for the last line of a run that was interrupted."""
        return f"what there is was written to {self.file}" if self.file else "nothing was written"

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
