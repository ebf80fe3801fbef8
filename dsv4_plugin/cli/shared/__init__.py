"""What every command does alike: options, outputs, interrupts, secrets."""
