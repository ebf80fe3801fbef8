"""Shared by all adapters: activation, patches, decisions, logits, fallback and shadow mode."""
