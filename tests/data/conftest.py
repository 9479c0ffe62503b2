from sample_pictures import configure, folder, rejected  # noqa: F401
