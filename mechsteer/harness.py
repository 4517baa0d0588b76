"""EleutherAI's lm-evaluation-harness on steered models."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch

from mechsteer.errors import MechsteerError
from mechsteer.hooks import Intervention, check
from mechsteer.model import Model
from mechsteer.progress import bar
from mechsteer.prompts import Prompts
from mechsteer.rows import of_like_lengths

# What a task may ask of generation.
_SUPPORTED = ("do_sample", "max_gen_toks", "temperature", "top_k", "top_p", "until")


def harness_model(
    model: Model,
    interventions: Iterable[Intervention] = (),
    *,
    batch_tokens: int = 2000,
    max_new_tokens: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """A model under interventions, as lm-evaluation-harness takes models.

        lm = harness_model(model, [ms.Add(joy, 4.0)])
        lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"], limit=100)["results"]

    Every task of the harness runs on it, few-shot examples and chat templates (`apply_chat_template=True`) included.
    Without interventions its numbers are those of the harness's own "hf" model of the same weights. Whatever the tokens
    are of, contexts count as the user's (BOS as scaffold) and continuations as the completion, where `at` of an
    intervention is the name of a span.

    Args:
        model: to evaluate.
        interventions: applied to everything that is scored or generated. They hold one value for all prompts.
        batch_tokens: at most this many tokens in a batch, padding included.
        max_new_tokens: where a task does not say how much to generate.
        seed: of the draws, for tasks that sample.
        progress: show a bar where it takes long.

    Returns:
        An `lm_eval.api.model.LM`.

    Raises:
        MechsteerError: lm-evaluation-harness is not installed, or an intervention does not fit the model.
    """
    applied = tuple(interventions)
    check(applied, model, None)
    return _lm_class()(model, applied, batch_tokens, max_new_tokens, seed, progress)


@cache
def _lm_class() -> type:
    """The class, made when it is first needed, because its base is in an optional package."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.models.utils import normalize_gen_kwargs
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise MechsteerError(
            f"lm-evaluation-harness is not installed ({error}). Run pip install 'mechsteer[harness]'."
        ) from error

    class SteeredLM(TemplateLM):
        """Scores and generates with `Model.run` and `Model.generate` under interventions."""

        def __init__(
            self,
            model: Model,
            interventions: tuple[Intervention, ...],
            batch_tokens: int,
            max_new_tokens: int,
            seed: int,
            progress: bool,
        ) -> None:
            super().__init__()
            self.model, self.interventions, self.tokenizer = model, interventions, model.tokenizer
            self._batch_tokens, self._max_new_tokens = batch_tokens, max_new_tokens
            self._seed, self._progress, self._device = seed, progress, model.device

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            """What stands before a text without a context."""
            bos = self.tokenizer.bos_token_id
            return self.eot_token_id if bos is None else bos

        @property
        def tokenizer_name(self) -> str:
            """Names tokenizer and template in the harness's cache of requests."""
            template = str(getattr(self.tokenizer, "chat_template", None))
            return f"{self.model.name}-{hashlib.sha256(template.encode()).hexdigest()[:12]}"

        def get_model_info(self) -> dict[str, Any]:
            """What the harness writes beside its results."""
            return {
                "model": self.model.name,
                "model_sha": self.model.id.hash,
                "interventions": [repr(each) for each in self.interventions],
            }

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            # A rendered chat template already holds BOS.
            bos = self.tokenizer.decode(self.prefix_token_id)
            special = not string.startswith(bos) if add_special_tokens is None else add_special_tokens
            return self.tokenizer.encode(string, add_special_tokens=special)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            """Log-probability of each continuation, and whether it is what greedy decoding gives."""
            wrong = [len(new) for _, _, new in requests if not 1 <= len(new) <= self.model.n_ctx]
            if wrong:
                raise MechsteerError(
                    f"A continuation has {wrong[0]} tokens, and the context of {self.model.name} is "
                    f"{self.model.n_ctx}. Leave such documents out."
                )
            # A context that is too long loses its beginning. The last token is fed only where there is room for it:
            # nothing that follows it is scored.
            n_ctx = self.model.n_ctx
            contexts = [context[-(n_ctx + 1 - len(new)) :] for _, context, new in requests]
            fed = [new[: n_ctx - len(context)] for context, (_, _, new) in zip(contexts, requests, strict=True)]
            whole = Prompts.from_ids(contexts, tokenizer=self.tokenizer).with_completions(fed)
            found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
            with bar("requests", len(requests), show=self._progress and not disable_tqdm) as shown:
                for index in of_like_lengths(whole.lengths, self._batch_tokens):
                    part = self.model.prompts(whole[index].padded("right"))
                    places = index.tolist()
                    counts = [len(requests[place][2]) for place in places]
                    targets = torch.tensor([token for place in places for token in requests[place][2]])
                    ahead = part.positions - part.decision[:, None]
                    mask = (ahead >= 0) & (ahead < torch.tensor(counts, device=ahead.device)[:, None])
                    rows = self.model.run(part, self.interventions, logits=mask).logits_at(mask).float()
                    targets = targets.to(rows.device)
                    log_probs = rows.log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu().double()
                    greedy = (rows.argmax(-1) == targets).cpu()
                    for place, own, same in zip(places, log_probs.split(counts), greedy.split(counts), strict=True):
                        found[place] = float(own.sum()), bool(same.all())
                    shown.advance(len(index))
            for (asked, _, _), answer in zip(requests, found, strict=True):
                if asked is not None:
                    self.cache_hook.add_partial("loglikelihood", asked, answer)
            return found

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """Log-probability of each text, in windows of the model's context."""
            windows, owner = [], []
            for row, request in enumerate(requests):
                pieces = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.model.n_ctx,
                    context_len=1,
                )
                for piece in pieces:
                    context, continuation = make_disjoint_window(piece)
                    windows.append((None, context, continuation))
                    owner.append(row)
            totals = [0.0] * len(requests)
            scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
            for row, (log_prob, _) in zip(owner, scored, strict=True):
                totals[row] += log_prob
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """What the model says up to the first of the strings that a task stops at."""
            texts = [""] * len(requests)
            by_options: dict[str, list[int]] = {}
            for place, request in enumerate(requests):
                by_options.setdefault(repr(sorted(request.args[1].items())), []).append(place)
            for places in by_options.values():
                options: dict[str, Any] = dict(normalize_gen_kwargs(requests[places[0]].args[1], self._max_new_tokens))
                n_new = options["max_gen_toks"]
                room = self.model.n_ctx - n_new
                if room < 1:
                    raise MechsteerError(
                        f"A task generates {n_new} tokens, and the context of {self.model.name} is {self.model.n_ctx}. "
                        "Set max_gen_toks in the task's generation_kwargs, or max_new_tokens= here."
                    )
                ids = [self.tok_encode(requests[place].args[0])[-room:] for place in places]
                done = self.model.generate(
                    Prompts.from_ids(ids, tokenizer=self.tokenizer), max_new_tokens=n_new,
                    interventions=self.interventions, seed=self._seed, progress=self._progress and not disable_tqdm,
                    **_sampling(options),
                )  # fmt: skip
                for place, text in zip(places, done.completions, strict=True):
                    for stop in filter(None, options["until"]):
                        text = text.split(stop)[0]
                    texts[place] = text
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
            return texts

    return SteeredLM


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `Model.generate` that say how to draw."""
    unknown = sorted(set(options) - set(_SUPPORTED))
    if unknown:
        raise MechsteerError(
            f"A task asks for {unknown[0]}={options[unknown[0]]!r} in its generation_kwargs, which is not supported. "
            f"Supported are {', '.join(_SUPPORTED)}."
        )
    temperature = float(options.get("temperature", 0.0))
    if temperature == 0:
        return {"temperature": 0.0}
    return {"temperature": temperature, "top_k": options.get("top_k"), "top_p": options.get("top_p")}
