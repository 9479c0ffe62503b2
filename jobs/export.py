"""Take adapters elsewhere, without Ray and without a GPU.

python jobs/export.py convert model=sd15 adapter=runs/my-dog/adapter layout=kohya output=my-dog.safetensors
python jobs/export.py merge model=sd15 'adapters=[runs/my-dog/adapter, style.safetensors]' 'weights=[1, 0.6]' output=runs/both
python jobs/export.py fuse model=sd15 adapters=runs/my-dog/adapter output=my-dog-model
python jobs/export.py extract model=sd15 tuned=runs/my-style/adapter rank=32 output=runs/my-style-lora
"""

import sys
from collections.abc import Sequence

from ray_sd.config.export import EXPORTS
from ray_sd.config.load import load_config, run_job
from ray_sd.config.words import no_such
from ray_sd.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    verb = argv[0] if argv else ""
    if verb in ("--help", "-h"):
        print(__doc__, end="")
        return
    if verb not in EXPORTS:
        raise ConfigError(f"{no_such('verb', verb, EXPORTS)}; --help shows how each is used")
    config = load_config(argv[1:], EXPORTS[verb])
    from ray_sd.export import export

    print(export(config))


if __name__ == "__main__":
    sys.exit(run_job(main))
