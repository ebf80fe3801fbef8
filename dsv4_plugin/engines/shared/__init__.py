"""What all adapters share: activation, patches, decisions, logits, fallback and shadow mode."""
