"""SGLang finds this plugin only where this folder is on PYTHONPATH, as bench puts it for an emulated link."""


def load() -> None:
    from bench.engines.emulated_link import hooks

    hooks.load()
