"""What the commands share: inputs, oracles, guards, timing, results files."""
