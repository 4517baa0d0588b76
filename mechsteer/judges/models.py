"""Judges that are models: any causal language model that is asked yes or no, and text classifiers."""

import os
from collections.abc import Sequence

import torch

from mechsteer.backends.classifier import TextClassifier
from mechsteer.errors import MechsteerError
from mechsteer.judges.judge import Judge
from mechsteer.model import Model
from mechsteer.objectives import LogitGap
from mechsteer.prompts import Prompts
from mechsteer.rendering import control_tokens
from mechsteer.sweeps import sweep

# As in the source, where no blank stands before "(any" and before "Reply".
TEMPLATE = (
    "Text:\n{completion}\n\n"
    "Does the text above express the concept {concept}"
    "(any word linked to the concept in the whole sentence even if it do not make sense is sufficient for a positive "
    "reply)?"
    "Reply with 1 for yes and 0 for no.\n"
    "Answer:"
)
"""The question of "A theory of steering strength", Appendix A, after Chen et al. 2025."""


def yes_no_judge(
    model: Model,
    concept: str,
    *,
    template: str = TEMPLATE,
    yes: Sequence[str] = ("1",),
    no: Sequence[str] = ("0",),
    threshold: float | int = 0.5,
) -> Judge:
    """A causal language model that is asked whether a text expresses a concept.

        p(yes) = sum_{t in yes} exp z_t / sum_{t in yes or no} exp z_t

    z are the logits at the answer's first token, so that one forward pass judges a text and nothing is generated.

    Args:
        model: asked in its chat format where it has one, else in plain text.
        concept: goes into the template, such as "joy".
        template: the question, with {completion} and {concept}.
        yes: answers that mean yes: each counts where it is one token, with and without a blank before it.
        no: the same for no.
        threshold: of p(yes), from which on a text counts as showing the concept.

    Raises:
        MechsteerError: the template lacks one of its places, or no answer is one token. When judging: a text with the
            question does not fit the model's context.
    """
    absent = [place for place in ("{completion}", "{concept}") if place not in template]
    if absent:
        raise MechsteerError(f"The judge's template has no {absent[0]}. Write it where the text is to stand.")
    gap = LogitGap(_ids(yes, model, "yes"), _ids(no, model, "no"), reduce="logsumexp")
    control = list(control_tokens(model.tokenizer).values())

    def ask(texts: Sequence[str]) -> list[float]:
        # Both are put in at once, so that a text which says {concept} stays as it is.
        before, after = template.replace("{concept}", concept).split("{completion}", 1)
        asked = [before + _plain(text, control) + after for text in texts]
        chats = getattr(model.tokenizer, "chat_template", None)
        prompts = Prompts.from_chats(asked, model) if chats else Prompts.from_strings(asked, model)
        # No axes: the packed forward pass over the prompts as they are.
        margins = sweep(model, prompts, axes={}, build=lambda: None, measure=gap, progress=False)[gap.name]
        return torch.from_numpy(margins.values).double().sigmoid().tolist()

    return Judge(f"{model.name}, asked whether a text expresses {concept}", f"express {concept}", (), ask, threshold)


def classifier_judge(
    folder: str | os.PathLike[str],
    label: str,
    *,
    threshold: float | int = 0.5,
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> Judge:
    """A Hugging Face text classifier (`AutoModelForSequenceClassification`), by the probability of one label.

    Args:
        folder: local, with safetensors weights; no code from it is run.
        label: one of the classifier's.
        threshold: of the label's probability.
        batch_size: texts a batch.
        device: None means CUDA where there is one, else the CPU.

    Raises:
        ModelLoadError: the folder is incomplete or damaged, or its model has no classification head.
        MechsteerError: the classifier has no such label.
    """
    classifier = TextClassifier.load(folder, device=device)
    if label not in classifier.labels:
        raise MechsteerError(
            f"{classifier.name} has no label {label!r}. Pass one of {', '.join(map(repr, classifier.labels))}."
        )
    column = classifier.labels.index(label)

    def judge(texts: Sequence[str]) -> list[float]:
        return classifier.probabilities(texts, batch_size=batch_size)[:, column].tolist()

    return Judge(f"{classifier.name}'s label {label}", f"are labelled {label}", (), judge, threshold)


def _ids(answers: Sequence[str], model: Model, what: str) -> list[int]:
    """The single tokens that are one of the answers, with or without a blank before it."""
    tokenizer = model.tokenizer
    encoded = [
        tokenizer.encode(text, add_special_tokens=False) for answer in answers for text in (answer, f" {answer}")
    ]
    ids = [each[0] for each in encoded if len(each) == 1 and each[0] != getattr(tokenizer, "unk_token_id", None)]
    # SentencePiece vocabularies hold digits, but write "1" as a blank and a digit.
    vocabulary = tokenizer.get_vocab()
    ids += [vocabulary[piece] for answer in answers for piece in (answer, f"▁{answer}") if piece in vocabulary]
    if not ids:
        shown = ", ".join(map(repr, answers))
        raise MechsteerError(
            f"None of the answers {shown} is one token of {model.name}'s tokenizer. Pass others with {what}=."
        )
    return list(dict.fromkeys(ids))


def _plain(text: str, control: Sequence[str]) -> str:
    """The text without what the tokenizer would read as structure: a model may spell its own special tokens."""
    for token in control:
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text
