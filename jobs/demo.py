"""Teach the embedded model an animal it has never seen, and show it before and after: `python jobs/demo.py`."""

import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config, run_job


def main(argv: Sequence[str]) -> None:
    config = load_config(["experiment=demo", *argv], ExperimentConfig)
    folder = Path(config.storage_path)
    config = config.model_copy(update={"name": _free_name(folder, config.name)})
    from ray_sd.generate import ImageRequest, generate
    from ray_sd.media.pictures import save_png
    from ray_sd.media.sheets import contact_sheet
    from ray_sd.methods import load_adapter
    from ray_sd.models import load_model
    from ray_sd.train.run import fit

    result = fit(config)

    settings = config.trainer.validation
    requests = [
        ImageRequest(
            prompt=prompt,
            seed=settings.seed + i,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        )
        for i, prompt in enumerate(settings.prompts)
    ]
    model = load_model(config.model)
    before = generate(model, requests)
    load_adapter(model, Path(result.adapter))
    after = generate(model, requests)

    labels = [f"{when}: {request.prompt}" for when in ("before", "after") for request in requests]
    sheet = contact_sheet([*before, *after], labels, columns=len(requests))
    picture = folder / "before_after.png"
    save_png(sheet, picture, {"adapter": result.adapter, "prompts": list(settings.prompts), "seed": settings.seed})
    print(result.summary())
    print(f"pictures: {picture}")
    print(_next_steps(folder, result.adapter))


def _free_name(folder: Path, name: str) -> str:
    return next(numbered for i in itertools.count(1) if not (folder / (numbered := f"{name}-{i}")).exists())


def _next_steps(folder: Path, adapter: str) -> str:
    return f"""
What next:
  draw with it      python jobs/generate.py model=emoji adapter={shlex.quote(adapter)} \\
                        prompt='a owl on a purple background' num_images=4
  curves            tensorboard --logdir {shlex.quote(str(folder))}
  your own photos   python jobs/train.py experiment=lora name=my-dog dataset.source.path=PHOTOS \\
                        dataset.caption.template='a photo of a sks dog'   (needs a GPU and the sd15 weights)
  all settings      docs/configuration.md"""


if __name__ == "__main__":
    sys.exit(run_job(main))
