"""How large what is asked for is: in pixels, and in latents."""

from ray_sd.errors import RequestError
from ray_sd.models import DiffusionModel
from ray_sd.requests import ClipRequest, ImageRequest, Request, UpscaleRequest


def latent_shape(model: DiffusionModel, request: Request) -> tuple[int, ...]:
    """Shape of the latents that a request is drawn as: (C, h, w), of clips (F, C, h, w).

    Raises RequestError for what the model cannot draw.
    """
    match request:
        case ClipRequest():
            return _clip_shape(model, request)
        case UpscaleRequest():
            return _upscale_shape(model, request)
        case ImageRequest():
            height, width = picture_size(model, request)
            return model.unet.config.out_channels, height // model.latent_factor, width // model.latent_factor
    raise TypeError(f"nothing is drawn of a {type(request).__name__}")


def picture_size(model: DiffusionModel, request: ImageRequest) -> tuple[int, int]:
    """Height and width in pixels. Raises RequestError for a size that has no whole latents."""
    own = model.unet.config.sample_size
    own_height, own_width = (own, own) if isinstance(own, int) else own
    height = request.height or own_height * model.latent_factor
    width = request.width or own_width * model.latent_factor
    _check_sides(model, "a picture", height, width)
    return height, width


def _check_sides(model: DiffusionModel, what: str, height: int, width: int, purpose: str = "") -> None:
    if height % model.latent_factor or width % model.latent_factor:
        raise RequestError(
            f"{what} of {height} x {width} pixels{purpose}: both must be multiples of {model.latent_factor}"
        )


def _upscale_shape(model: DiffusionModel, request: UpscaleRequest) -> tuple[int, ...]:
    """The small picture is as large as the latents of the large one."""
    width, height = request.image.size
    _check_sides(model, "a picture", height, width, " to enlarge")
    if request.noise_level > model.max_noise_level:
        raise RequestError(
            f"noise_level {request.noise_level}: model '{model.config.name}' takes at most {model.max_noise_level}"
        )
    return model.unet.config.out_channels, height, width


def _clip_shape(model: DiffusionModel, request: ClipRequest) -> tuple[int, ...]:
    frames = request.num_frames or model.unet.config.num_frames
    height, width = request.size
    _check_sides(model, "a clip", height, width)
    if request.key_frames is None:
        if len(request.images) != 1:
            raise RequestError(f"{len(request.images)} condition frames and no key_frames that say where they stand")
    elif len(request.images) != len(request.key_frames):
        raise RequestError(f"{len(request.images)} condition frames for {len(request.key_frames)} key_frames")
    elif any(not -frames <= place < frames for place in request.key_frames):
        raise RequestError(f"key_frames {list(request.key_frames)} are not all within the clip's {frames} frames")
    return frames, model.unet.config.out_channels, height // model.latent_factor, width // model.latent_factor
