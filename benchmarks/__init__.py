"""Tools for maintainers; they run from a checkout and are not in the wheel."""
