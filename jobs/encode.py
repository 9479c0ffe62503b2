"""Encode a data set, or look after the cache.

python jobs/encode.py experiment=lora dataset.source.path=photos
python jobs/encode.py list [cache_path=runs/cache]
python jobs/encode.py prune older_than_days=30 | max_gb=50 | folder=latents/8c1d38b642588f1c [dry_run=true]
"""

import sys
from collections.abc import Sequence

from ray_sd.config import ExperimentConfig
from ray_sd.config.cache import CacheListConfig, CachePruneConfig
from ray_sd.config.load import load_config, load_settings, run_job
from ray_sd.config.paths import absolute_paths


def main(argv: Sequence[str]) -> None:
    verb = argv[0] if argv else ""
    if verb == "list":
        from ray_sd.data.prune import cache_table, list_cache

        print(cache_table(list_cache(load_settings(argv[1:], CacheListConfig).cache_path)))
    elif verb == "prune":
        from ray_sd.data.prune import cache_table, prune_cache

        settings = load_settings(argv[1:], CachePruneConfig)
        folders = prune_cache(settings)
        print(f"{'would remove' if settings.dry_run else 'removed'} {len(folders)} folders")
        print(cache_table(folders))
    else:
        config = load_config(argv, ExperimentConfig)
        from ray_sd.data import check_class_folder, check_crop, check_masks, list_source, prepare

        # As in jobs/train.py: the path of the data is what is wrong most often, and importing models takes seconds.
        listing = list_source(absolute_paths(config).dataset)
        from ray_sd.methods import build_method

        rows = build_method(config.method).rows()
        check_class_folder(rows)
        check_crop(config.dataset)
        check_masks(config.dataset)
        prepare(config, rows, listing)


if __name__ == "__main__":
    sys.exit(run_job(main))
