"""What all commands share: options, outputs, interrupts, secrets."""
