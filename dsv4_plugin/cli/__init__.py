"""The command ``dsv4-plugin``."""
