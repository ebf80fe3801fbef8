"""``fake_server.py`` and ``fake_client.py`` are separate programs."""

collect_ignore = ["fake_server.py", "fake_client.py"]
