"""The published recipe of "Towards Understanding Steering Strength", with transformers alone: forward hooks on the
outputs of blocks, one forward pass for each text or strength. Written from its description; no mechsteer in it."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Plain:
    """A model and its tokenizer, as transformers loads them in fp32."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        inner = self.model.base_model
        self.blocks = inner.h if hasattr(inner, "h") else inner.layers

    @torch.no_grad()
    def vectors(self, positives: Sequence[str], negatives: Sequence[str], *, max_tokens: int = 300) -> torch.Tensor:
        """[layer, d_model]: mean over texts of the mean over tokens, positives less negatives."""
        means = []
        for texts in (positives, negatives):
            rows = []
            for text in texts:
                tokens = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=max_tokens)
                taken: list[torch.Tensor] = []
                with self.hooked(lambda x, taken=taken: taken.append(x) or x, range(len(self.blocks))):
                    self.model(**tokens)
                rows.append(torch.stack([x[0].mean(0) for x in taken]))
            means.append(torch.stack(rows).mean(0))
        return means[0] - means[1]

    @torch.no_grad()
    def token_probabilities(
        self, context: str, layer: int, vector: torch.Tensor, alphas: torch.Tensor, *, last: bool = False
    ) -> torch.Tensor:
        """[alpha, d_vocab]: softmax at the last position of a context of at most 100 tokens."""
        tokens = self.tokenizer(context, return_tensors="pt", truncation=True, max_length=100)
        rows = []
        for alpha in alphas:
            with self.hooked(lambda x, alpha=alpha: steered(x, alpha * vector, last=last), [layer]):
                rows.append(torch.softmax(self.model(**tokens).logits[0, -1].float(), -1))
        return torch.stack(rows)

    @torch.no_grad()
    def delta_ce(
        self, documents: Sequence[str], layer: int, vector: torch.Tensor, alphas: torch.Tensor, *, window: int = 128
    ) -> torch.Tensor:
        """[alpha]: change of the summed NLL over the number of tokens, in fp64; `alphas` holds 0."""
        blocks = []
        for document in documents:
            ids = self.tokenizer(document, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
            start = 0
            while start + window + 1 <= len(ids):
                blocks.append(ids[start : start + window + 1])
                start += window
        batch = torch.tensor(blocks)
        sums = torch.zeros(len(alphas), dtype=torch.float64)
        for place, alpha in enumerate(alphas):
            with self.hooked(lambda x, alpha=alpha: steered(x, alpha * vector), [layer]):
                for block in batch:
                    logits = self.model(block[None, :-1], use_cache=False).logits[0].float()
                    sums[place] += torch.nn.functional.cross_entropy(logits, block[1:], reduction="none").double().sum()
        ce = sums / (batch.shape[0] * window)
        return ce - ce[(alphas == 0).nonzero()[0, 0]]

    @contextmanager
    def hooked(self, change: Callable[[torch.Tensor], torch.Tensor], layers: Sequence[int]) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        handles = [self.blocks[layer].register_forward_hook(hook) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def steered(x: torch.Tensor, push: torch.Tensor, *, last: bool = False) -> torch.Tensor:
    if not last:
        return x + push
    mask = torch.zeros(x.shape[1], 1)
    mask[-1] = 1
    return x + mask * push


def grid(low: float, high: float, steps: int) -> torch.Tensor:
    """linspace with 0 put in."""
    alphas = torch.linspace(low, high, steps)
    return alphas if bool((alphas == 0).any()) else torch.cat([alphas, torch.zeros(1)]).sort().values
