"""``fake_server.py`` and ``fake_client.py`` are programs of their own."""

collect_ignore = ["fake_server.py", "fake_client.py"]
