"""One adapter per engine. Each finds its places by looking, patches them, and can take it back."""
