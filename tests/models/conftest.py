from tiny_models import tiny, tiny_xl  # noqa: F401
