"""The table of the settings, of docs/settings.md."""

from __future__ import annotations

from dsv4_plugin.envs import VARIABLES

__all__ = ["table"]


def table() -> str:
    """Return the settings as the Markdown table that docs/settings.md shows."""
    lines = ["| variable | values | default | meaning |", "|---|---|---|---|"]
    for v in VARIABLES:
        choices = " ".join(f"`{c}`" for c in v.choices if c) or "an absolute path"
        lines.append(f"| `{v.name}` | {choices} | {v.default or 'unset'} | {v.meaning} |")
    return "\n".join(lines)
