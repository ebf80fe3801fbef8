"""One adapter for each engine. It looks for its seams, patches them, and can undo the patches."""
