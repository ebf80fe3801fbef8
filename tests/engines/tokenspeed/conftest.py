"""The cases in ``cases/`` run inside a release of the engine; ``test_releases.py`` starts them."""

collect_ignore = ["engine"]
