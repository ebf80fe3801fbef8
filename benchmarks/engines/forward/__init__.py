"""SGLang's and TokenSpeed's own indexer code on a GPU, without the plugin and with it."""
