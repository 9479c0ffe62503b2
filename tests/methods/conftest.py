from tiny_models import tiny, tiny_video, tiny_xl  # noqa: F401
