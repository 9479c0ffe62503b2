"""The adapters of a model, of which every drawing takes its own: LoRAs and words. The model itself stays what it is."""

from collections.abc import Sequence

from ray_sd.errors import ArtifactError, RequestError
from ray_sd.generate.bank import LoraBank
from ray_sd.generate.words import WordBank
from ray_sd.methods.contents import Contents
from ray_sd.methods.lora_names import LoraNames
from ray_sd.models import DiffusionModel
from ray_sd.requests import Mix


class Adapters:
    """Adapters by name, which drawings of one batch may mix as they like."""

    def __init__(self, model: DiffusionModel) -> None:
        self.loras = LoraBank(LoraNames(model).layers)
        self.words = WordBank(model)

    def add(self, name: str, contents: Contents) -> None:
        """Keep an adapter. Raises ArtifactError for one that does not stack with others."""
        if not stacks(contents):
            raise ArtifactError(f"adapter '{name}' is no sum of low rank; it is drawn with by itself (load_adapter)")
        if contents.updates:
            self.loras.add(name, contents.updates)
        self.words.add(name, contents.embeddings)

    def remove(self, name: str) -> None:
        if name in self.loras:
            self.loras.remove(name)
        self.words.remove(name)

    def choose(self, component: str, rows: Sequence[Mix]) -> None:
        """Give the rows of a component's next batches their LoRAs; one mix is for all rows of a text encoder's."""
        self.loras.choose(component, [self._with_loras(row) for row in rows])

    def spell(self, prompt: str, mix: Mix) -> str:
        """A prompt with its adapters' words. Raises RequestError where two of them have one that the prompt has."""
        return self.words.spell(prompt, [name for name, _ in mix])

    def check(self, mix: Mix) -> None:
        """Raise RequestError for adapters that are not there, and for a word's strength."""
        for name, weight in mix:
            if name not in self.words:
                raise RequestError(f"no adapter '{name}' is loaded", param="adapters")
            if weight != 1 and name not in self.loras:
                raise RequestError(
                    f"adapter '{name}' is a word, which has no strength; give it the weight 1", param="adapters"
                )

    def _with_loras(self, mix: Mix) -> Mix:
        return tuple((name, weight) for name, weight in mix if name in self.loras)


def stacks(contents: Contents) -> bool:
    """Whether an adapter is a sum of low rank, words, or both: no whole weights, and no DoRA."""
    updates = (update for of_layers in contents.updates.values() for update in of_layers.values())
    return not contents.weights and all(update.magnitude is None for update in updates)
