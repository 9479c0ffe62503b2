"""Stable Diffusion XL (arXiv:2307.01952): two text encoders, a pooled embedding, and conditions on size and crop."""

from functools import cached_property
from typing import ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from ray_sd.errors import ArtifactError
from ray_sd.models.components import read_index
from ray_sd.models.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    embeddings = ("text_embeds", "pooled_text_embeds")
    hidden_states = "PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED"
    encoder_classes: ClassVar[dict[str, type[PreTrainedModel]]] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }

    @cached_property
    def zero_empty_prompt(self) -> bool:
        """Whether the model was trained with zeros in place of the empty prompt's embeddings, as the public base was."""
        return read_index(self.config).get("force_zeros_for_empty_prompt", True)

    def _check_conditions(self) -> None:
        if self.unet is None:
            return
        found = self.unet.config.addition_embed_type
        if found != "text_time":
            raise ArtifactError(
                f"model '{self.config.name}': the U-Net's addition_embed_type is {found}, Stable Diffusion XL's is text_time; "
                "is model.family right?"
            )
        for setting in ("class_embed_type", "time_cond_proj_dim"):
            if self.unet.config[setting] is not None:
                raise ArtifactError(
                    f"model '{self.config.name}': the U-Net takes conditions besides text and sizes ({setting}), such as "
                    "distilled models have; take the Stable Diffusion XL that it was made from"
                )
        encoder = self.text_encoder_2
        if encoder is None:
            return
        makes = encoder.config.projection_dim + 6 * self.unet.config.addition_time_embed_dim
        takes = self.unet.config.projection_class_embeddings_input_dim
        if takes != makes:
            raise ArtifactError(
                f"model '{self.config.name}': the U-Net takes {takes} numbers of pooled text and sizes, the text_encoder_2 "
                f"and six sizes make {makes}; refiners are not text-to-image models"
            )

    def unread_layers(self) -> dict[str, tuple[str, ...]]:
        # The U-Net reads what the last layer of each encoder is given; of the second, pooling reads the rest.
        last = self.text_encoder.config.num_hidden_layers - 1
        return {"text_encoder": (f"encoder.layers.{last}.", "final_layer_norm.")}

    def encode_text(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """`text_embeds` [B, L, D1 + D2] and `pooled_text_embeds` [B, P], of which the first chunk is pooled."""
        rows = tokens["input_ids"]
        first = self.text_encoder(self._by_chunk(rows), output_hidden_states=True)
        second = self.text_encoder_2(self._by_chunk(tokens["input_ids_2"]), output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        text = text.reshape(len(rows), -1, text.shape[-1])
        pooled = second.text_embeds.reshape(len(rows), self.config.prompt_chunks, -1)[:, 0]
        if self.zero_empty_prompt:
            says_something = (rows[:, 1] != self.tokenizer.eos_token_id).to(text.dtype)
            text, pooled = text * says_something[:, None, None], pooled * says_something[:, None]
        return {"text_embeds": text, "pooled_text_embeds": pooled}

    def size_conditions(self, height: int, width: int) -> dict[str, Tensor]:
        return {"add_time_ids": torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)}

    def denoise(self, latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype = self.dtype
        added = {
            "text_embeds": conditions["pooled_text_embeds"].to(dtype),
            "time_ids": conditions["add_time_ids"].float(),  # half precision rounds whole numbers above 256
        }
        return self.unet(
            latents.to(dtype),
            timesteps,
            encoder_hidden_states=conditions["text_embeds"].to(dtype),
            added_cond_kwargs=added,
        ).sample

    def float32_parts(self) -> tuple[nn.Module, ...]:
        asked = self.vae is not None and self.config.vae_float32 is None and self.vae.config.force_upcast
        return (self.vae,) if asked else super().float32_parts()

    def pipeline(self) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            unet=self.unet,
            scheduler=self.sampler(),
            force_zeros_for_empty_prompt=self.zero_empty_prompt,
            add_watermarker=False,
        )
