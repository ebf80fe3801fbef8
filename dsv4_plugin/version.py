"""The plugin's version, as the build wrote it."""

from __future__ import annotations

__all__ = ["__version__"]

try:
    from dsv4_plugin._version import __version__
except ImportError:  # a source tree that was not built
    __version__ = "0+unknown"
