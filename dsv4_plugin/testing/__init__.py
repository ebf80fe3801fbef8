"""What tests, benchmarks and the demo share: inputs and checks."""
