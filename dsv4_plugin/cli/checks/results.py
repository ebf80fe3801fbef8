"""The results file of a benchmark: whole at any moment, also when the run is killed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from dsv4_plugin.cli.bench.topk import UsageError

__all__ = ["Results"]

SAVE_EVERY_S = 2.0


class Results:
    """A results document and the file that it is kept in, if any.

    Raises:
        UsageError: the file cannot be written; now, not when all is measured.
    """

    def __init__(self, document: dict[str, Any], file: Path | None) -> None:
        self.document, self.file, self._saved = document, file, 0.0
        try:
            self.save(now=True)
        except OSError as error:
            raise UsageError(f"--json cannot be written: {error}") from error

    def save(self, *, now: bool = False) -> None:
        """Write the file, unless it was written a moment ago; ``now``: in any case."""
        if self.file and (now or time.monotonic() - self._saved > SAVE_EVERY_S):
            _write(self.document, self.file)
            self._saved = time.monotonic()


def _write(document: dict[str, Any], file: Path) -> None:
    part = file.with_name(file.name + ".part")
    head = {name: value for name, value in document.items() if name not in ("bars", "results")}
    text = json.dumps(head, indent=1).removesuffix("\n}")
    for name in ("bars", "results"):
        lines = ",\n  ".join(json.dumps(row) for row in document[name])
        text += f',\n "{name}": [\n  {lines}\n ]' if lines else f',\n "{name}": []'
    part.write_text(text + "\n}\n")
    os.replace(part, file)
