"""The command that uses what a run has learnt."""

import shlex

from ray_sd.config import ExperimentConfig
from ray_sd.config.method import TemporalDecoderMethod
from ray_sd.config.text_to_video import METHODS_OF, DecodeStage, VideoStage
from ray_sd.methods import build_method

PUBLISHED = "svd"
"""The chain that goes with every video model and upscaler that is not embedded."""


def usage(config: ExperimentConfig, adapter: str) -> str:
    """The command that draws with an adapter, or trains on an autoencoder that no U-Net knows yet.

    Of a video's stages it names those that it takes and leaves out the others.
    """
    model, method = config.model, config.method.name
    if build_method(config.method).moves_latents:
        return f"python jobs/train.py model={model.name} model.vae={shlex.quote(f'{adapter}/vae')} …"
    if not (model.makes_videos or model.upscales):
        return f"python jobs/generate.py model={model.name} adapter={shlex.quote(adapter)} prompt='…'"
    learnt = "upscale"
    if model.makes_videos:
        learnt = next(stage for stage, methods in METHODS_OF.items() if method in methods)
    # Frames are drawn between key frames of the model that learnt to, and decoded where there are any.
    taken = {"interpolation": ("video", "interpolation"), "decode": ("video",)}.get(learnt, (learnt,))
    settings = [] if model.is_embedded else [f"chain={PUBLISHED}"]
    settings += ["picture=FILE", "image=null"]
    for stage in ("video", "interpolation", "upscale"):
        if stage not in taken:
            settings.append(f"{stage}=null")
        elif stage == learnt or not model.is_embedded:  # the embedded models are of one stage each, and the default
            settings.append(f"{stage}.model={model.name}")
    settings += [f"{learnt}.adapter={shlex.quote(adapter)}", *_as_trained(config, learnt)]
    return f"python jobs/text_to_video.py {' '.join(settings)}"


def _as_trained(config: ExperimentConfig, stage: str) -> list[str]:
    """Settings of a video like the clips that a stage's adapter was trained on, where they are no defaults."""
    clips = config.dataset.video
    if clips is None:
        return []
    settings = [f"height={config.dataset.height}", f"width={config.dataset.width}"]
    fps = clips.fps
    if stage == "interpolation":
        settings.append(f"interpolation.num_frames={clips.num_frames}")
        fps /= clips.num_frames - 1
    else:
        settings.append(f"video.num_frames={clips.num_frames}")
    if fps != VideoStage.model_fields["fps"].default:
        settings.append(f"video.fps={fps:g}")
    if isinstance(config.method, TemporalDecoderMethod):
        chunk_size = config.method.chunk_size or clips.num_frames
        if chunk_size != DecodeStage().chunk_size:
            settings.append(f"decode.chunk_size={chunk_size}")
    return settings
