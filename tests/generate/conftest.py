from tiny_models import tiny, tiny_upscale, tiny_video, tiny_xl  # noqa: F401
