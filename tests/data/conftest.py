from sample_pictures import configure, folder, rejected  # noqa: F401
from tiny_detector import detector, random_detector  # noqa: F401
from tiny_models import tiny_video  # noqa: F401
