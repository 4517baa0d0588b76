"""Text classifiers as transformers runs them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsteer.backends.huggingface import read_folder


@dataclass(frozen=True, eq=False)
class TextClassifier:
    """A sequence classifier with its tokenizer.

    Attributes:
        name: the folder's own name.
        labels: what its outputs are called, in their order.
    """

    name: str
    labels: tuple[str, ...]
    _model: Any
    _tokenizer: Any

    @staticmethod
    def load(folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> "TextClassifier":
        """Read a Hugging Face folder: local files, safetensors, and no code from it.

        Args:
            folder: holds config.json, model.safetensors and a tokenizer.
            device: None means CUDA where there is one, else the CPU.

        Raises:
            ModelLoadError: it is incomplete or damaged, or its model has no classification head.
        """
        source = read_folder(Path(folder), dtype=torch.float32, auto="AutoModelForSequenceClassification")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        names = source.model.config.id2label
        labels = tuple(str(names[index]) for index in range(source.model.config.num_labels))
        return TextClassifier(Path(folder).resolve().name, labels, source.model.to(device), source.tokenizer)

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str], *, batch_size: int = 32) -> Float[Tensor, "text label"]:
        """Probability of each label: they add up to 1, unless the config says that several can hold at once.

        Texts longer than the model's context are cut at their end.
        """
        config = self._model.config
        # Without padding, texts of unlike lengths do not fit one batch; a decoder then cannot find each text's end.
        padless = self._tokenizer.pad_token_id is None or config.get_text_config().pad_token_id is None
        size = 1 if padless else batch_size
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        out = torch.empty(len(texts), len(self.labels))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            inputs = self._tokenizer(
                [texts[index] for index in part], return_tensors="pt", padding=size > 1, truncation=True,
                max_length=min(self._tokenizer.model_max_length, config.get_text_config().max_position_embeddings),
            )  # fmt: skip
            logits = self._model(**inputs.to(self._model.device)).logits.float()
            several = config.problem_type == "multi_label_classification" or len(self.labels) == 1
            out[part] = (logits.sigmoid() if several else logits.softmax(-1)).cpu()
        return out
