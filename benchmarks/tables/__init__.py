"""Makes the tables of README and docs from committed results files."""
