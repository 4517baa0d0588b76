"""The forms that a push can take, each made from a case on its requests to search on: a vector, features, embeddings,
other tokens, an edit of the weights."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from mechsteer.directions import Direction, difference_of_means
from mechsteer.errors import MechsteerError
from mechsteer.features import rank_by_contrast
from mechsteer.hooks import Intervention
from mechsteer.interventions import Add, SetFeature, SoftPrefix
from mechsteer.model import Model
from mechsteer.objectives import Objective
from mechsteer.objectives.base import predicting
from mechsteer.pocket.grammar import sample_document
from mechsteer.prefix import Constraints
from mechsteer.prefix.match import MatchedPrefix, beam_evaluations, match_prefix
from mechsteer.prompts import Prompts
from mechsteer.propagator.activation_rows import token_rows
from mechsteer.propagator.weight_edit import RankEdit, fit_edit
from mechsteer.site import Site
from mechsteer.strength import ChosenAlpha, choose_alpha
from mechsteer.study.autoencoder import autoencoder
from mechsteer.study.case import Case, completion_ids
from mechsteer.study.measures import CE, weights
from mechsteer.sweeps import sweep
from mechsteer.vocabulary import insert

# Depths of the blocks tried, as shares of the way through the model.
DEPTHS = (0.25, 0.5, 0.75)
# What a nat a token on the model's own completions may cost in completions that show the behaviour.
WEIGHT = 0.25
BUDGET = 7
# Features: how many, and held at which multiple of their mean with the prefix.
FEATURES, TIMES = (1, 4), (1.0, 2.0, 3.0)
# Edits of the weights: depths, multiples of what the prefix adds, and rank.
EDIT_DEPTHS, EDIT_TIMES, RANK, RIDGE = (0.4, 0.6, 0.8), (1.0, 1.5, 2.0), 8, 1e-2
SEARCHED, VALIDATED, MATCHED_TOKENS = 12, 6, 32
"""Requests that words are searched on, those that say when the soft prefix stops, and tokens of each completion: those
that count three times."""
SOFT_STEPS, EVALUATIONS, BEAM, TOP_K = 60, 200, 3, 6
"""Steps of the soft prefix, candidates after the beam, and the beam."""
# Texts that have nothing to do with the requests: how many, and the most tokens of each.
TEXTS, TEXT_TOKENS = 24, 64


@dataclass(frozen=True, eq=False)
class Push:
    """One form of a push, ready to be run.

        push.model.generate(push.prompts, interventions=push.interventions)
        push.model.run(push.on(texts), push.interventions)

    Attributes:
        name: what it is called.
        size: how large it is, in words.
        model: under study, or a copy of it with edited weights.
        prompts: all requests of the case, without completions, with what the push puts before them.
        interventions: in the order in which they act.
        layer: the last block behind which it adds anything by itself; -1 for what comes in by the embeddings alone.
        ids, slots: what it puts before a text.
    """

    name: str
    size: str
    model: Model
    prompts: Prompts
    interventions: tuple[Intervention, ...] = ()
    layer: int = -1
    ids: tuple[int, ...] = ()
    slots: int = 0

    def on(self, texts: Prompts) -> Prompts:
        """Other texts, with what the push puts before them."""
        return insert(texts, self.ids, where="prefix", slots=self.slots)


@dataclass(frozen=True, eq=False)
class Chosen:
    """A push that was chosen among several.

    Attributes:
        push: the one with the highest score.
        tried: every one: its `setting` in words, its `target` and `rise` as in `score`, and its `score`.
    """

    push: Push
    tried: tuple[dict[str, Any], ...]


@dataclass(frozen=True, eq=False)
class ChosenVector:
    """The difference of means whose chosen strength gains most.

    Attributes:
        vectors: all that were tried, by name.
        chosen: the strength of each, and why.
        name: of the one that was picked.
        alpha: its strength; where none works, the best of those tried.
    """

    vectors: dict[str, Direction]
    chosen: ChosenAlpha
    name: str
    alpha: float

    @property
    def direction(self) -> Direction:
        """The one that was picked."""
        return self.vectors[self.name]


def reference(case: Case) -> Push:
    """The prefix itself."""
    ids = tuple(case.model.tokenizer.encode(case.settings.prefix, add_special_tokens=False))
    return Push("reference prefix", f"{_tokens(len(ids))}", case.model, case.prefixed, ids=ids)


def nothing(case: Case) -> Push:
    """The requests alone."""
    return Push("no push", "", case.model, case.plain)


# ---- a vector ----

# One study asks for it in more than one chapter, and it is the dearest to make.
_VECTORS: WeakKeyDictionary[Case, ChosenVector] = WeakKeyDictionary()


def mean_vectors(case: Case) -> dict[str, Direction]:
    """Differences of mean activations over the reference completions, with the prefix and without it, at three depths,
    named "after block 2"."""
    search = case.rows("search")
    found = difference_of_means(
        case.model, case.reference[search], case.with_reference(case.plain)[search],
        sites=[Site("resid_post", layer) for layer in _layers(case, DEPTHS)], tokens="completion", progress=False,
    )  # fmt: skip
    return {f"after block {site.layer}": direction for site, direction in found.items()}


def chosen_vector(case: Case) -> ChosenVector:
    """The mean vector and the strength of `mechsteer.strength.choose_alpha`; made once for a case.

    The score is the share of completions that show the behaviour (without a judge: minus the cross entropy of the
    reference completions), less `WEIGHT` times the rise of the cross entropy of what the model says by itself.
    """
    if case not in _VECTORS:
        search, judged = case.rows("search"), case.judge is not None
        vectors = mean_vectors(case)
        case.tell(f"choosing the strength of {len(vectors)} vectors, from {BUDGET} exact points each")
        wanted = case.plain[search] if judged else case.with_reference(case.plain)[search]
        goal: Objective | Any = case.judge if judged else -CE
        chosen = choose_alpha(
            case.model, vectors, wanted, goal, side_effect=CE, side_prompts=case.unsteered[search], weight=WEIGHT,
            budget=BUDGET, max_new_tokens=case.max_new_tokens, seed=case.settings.seed, progress=False,
        )  # fmt: skip
        name = _best(chosen)
        _VECTORS[case] = ChosenVector(vectors, chosen, name, _strength(chosen, name))
    return _VECTORS[case]


def vector(case: Case) -> Push:
    """`chosen_vector` as a push, at every token."""
    found = chosen_vector(case)
    length = found.alpha / float(found.chosen.result["scale"].sel(direction=found.name))
    layer = found.direction.site.layer
    assert layer is not None
    return Push(
        "vector", f"one vector {found.name}, {length:.2g} of the stream's length", case.model, case.plain,
        (Add(found.direction, found.alpha),), layer=layer,
    )  # fmt: skip


def _best(chosen: ChosenAlpha) -> str:
    """The direction whose chosen strength gains most; where none works, the one whose best point does."""
    gain = chosen.result["gain"]
    works = [name for name, yes in chosen.works.items() if yes] or list(chosen.works)
    return max(works, key=lambda name: float(gain.sel(direction=name)))


def _strength(chosen: ChosenAlpha, name: str) -> float:
    """What was chosen; where no strength works, the best of those tried, to have something to show."""
    one = chosen.result.sel(direction=name)
    if chosen.works[name]:
        return float(one["alpha"])
    points, values = one["point_alpha"].values, one["score"].values
    tried = [(float(value), float(point)) for value, point in zip(values, points, strict=True) if point > 0]
    return max(tried)[1]


# ---- features ----


def features(case: Case) -> Chosen:
    """SAE features that the prefix raises most over its completions, held at every token at a multiple of their mean
    there: the number and the multiple with the highest score.

    Raises:
        MechsteerError: no autoencoder that ships with mechsteer fits the model.
    """
    search = case.rows("search")
    forced = case.with_reference(case.plain)[search]
    sae, _ = autoencoder(case)
    ranked = rank_by_contrast(
        case.model, sae, case.reference[search], forced, at="completion", n=max(FEATURES), seed=case.settings.seed
    )
    ids, mean = ranked["feature"].values.tolist(), torch.from_numpy(ranked["positive"].values.copy())
    layer = sae.site.layer
    assert layer is not None
    pushes = {}
    for k in FEATURES:
        for times in TIMES:
            name, whose = (f"feature {ids[0]}", "its") if k == 1 else (f"{k} features", "their")
            often = "" if times == 1 else f"{times:g} times "
            size = f"{name} of {sae.n_features:,} after block {layer}, at {often}{whose} mean with the prefix"
            edit = SetFeature(sae, ids[:k], mean[:k].to(case.model.device) * times)
            pushes[size] = Push("features", size, case.model, case.plain, (edit,), layer=layer)
    tried = [{"setting": name, **score(case, push, search)} for name, push in pushes.items()]
    return Chosen(pushes[max(tried, key=lambda each: each["score"])["setting"]], tuple(tried))


# ---- what stands before the request ----


# As with vectors: more than one chapter asks for it.
_MATCHES: WeakKeyDictionary[Case, MatchedPrefix] = WeakKeyDictionary()


def matched(case: Case) -> MatchedPrefix:
    """Other words for the prefix, as many tokens long, which keep clear of `Case.telltale`: `match_prefix` on the first
    requests to search on; made once for a case.

    Raises:
        MechsteerError: nothing that is allowed is found.
        KeyboardInterrupt: it was stopped.
    """
    if case not in _MATCHES:
        rows, others = matched_rows(case)
        n = int(case.prefixed.span("prefix").sum(1).max())
        slotted = case.slotted(n)

        def forced(chosen: Sequence[int]) -> Prompts:
            return case.with_reference(slotted[list(chosen)], rows=chosen, tokens=MATCHED_TOKENS)

        def tell(stage: str, done: int, loss: float, text: str) -> None:
            if stage in ("projected", "beam") and done:
                case.tell(f"{stage}: cross entropy {loss:.3f} after {done} candidates")

        case.tell(f"a soft prefix of {n} embeddings, and {n} tokens from it")
        match = match_prefix(
            case.model, forced(rows), CE, soft_steps=SOFT_STEPS, n_restarts=1, beam=BEAM, top_k=TOP_K,
            evaluations=beam_evaluations(n, beam=BEAM, top_k=TOP_K) + EVALUATIONS, constraints=constraints(case),
            validation=forced(others) if others else None, seed=case.settings.seed, progress=False, tell=tell,
        )  # fmt: skip
        if not match.found.finished:
            raise KeyboardInterrupt
        _MATCHES[case] = match
    return _MATCHES[case]


def matched_rows(case: Case) -> tuple[list[int], list[int]]:
    """The requests that words are searched on, and those that say when the soft prefix stops."""
    search = case.rows("search")
    return search[:SEARCHED], search[SEARCHED : SEARCHED + VALIDATED]


def constraints(case: Case) -> Constraints:
    """On the words."""
    return Constraints(forbidden_words=case.telltale, characters="printable")


def prefixes(case: Case) -> tuple[Push, Push]:
    """The soft prefix and the words of `matched`.

    Raises:
        MechsteerError: nothing that is allowed is found.
    """
    match = matched(case)
    embeddings = match.soft.embeddings.to(case.model.device, case.model.dtype)
    n = len(embeddings)
    slotted = case.slotted(n)
    soft = Push(
        "soft prefix", f"{n} embeddings of {embeddings.shape[1]}", case.model, slotted, (SoftPrefix(embeddings),),
        slots=n,
    )  # fmt: skip
    words = Push(
        "searched prefix", f"{_tokens(len(match.ids))}: {match.text!r}", case.model,
        insert(slotted, match.ids, where="prefix"), ids=match.ids,
    )  # fmt: skip
    return soft, words


# ---- the weights ----


def weight_edit(case: Case) -> Chosen:
    """An edit of one MLP's output matrix of rank `RANK` that adds, where the reference completions are said without the
    prefix, what the prefix would add behind that block, and changes unrelated text least.

    So many numbers are fitted that an edit does best on the requests it was made from: block and multiple are those
    with the highest score on one half of the requests to search on, of edits made from the other; with them the edit is
    made anew from both.

    Raises:
        MechsteerError: the prefix adds nothing there, or the architecture has a norm behind that matrix.
    """
    search = case.rows("search")
    some, others = (search[::2], search[1::2]) if len(search) > 1 else (search, search)
    texts = unrelated(case, "to fit on")
    settings: dict[str, tuple[int, float]] = {}
    tried = []
    for layer in _layers(case, EDIT_DEPTHS):
        edit = _edit(case, some, layer, texts)
        for times in EDIT_TIMES if edit is not None else ():
            assert edit is not None
            name = f"block {layer}, {times:g} times what the prefix adds"
            settings[name] = layer, times
            tried.append({"setting": name, **score(case, edited(case, edit * times), others)})
    if not tried:
        raise MechsteerError(
            f"The prefix adds nothing behind block {', '.join(map(str, _layers(case, EDIT_DEPTHS)))} of "
            f"{case.model.name} that an edit could."
        )
    layer, times = settings[max(tried, key=lambda each: each["score"])["setting"]]
    edit = _edit(case, search, layer, texts)
    assert edit is not None
    return Chosen(edited(case, edit * times), tuple(tried))


def _edit(case: Case, rows: Sequence[int], layer: int, texts: Prompts) -> RankEdit | None:
    """The edit made from some requests; None where the prefix adds nothing behind that block."""
    forced, told = case.with_reference(case.plain)[list(rows)], case.reference[list(rows)]
    read, write = Site("mlp_post", layer), Site("resid_post", layer)
    added = _states(case.model, told, write) - _states(case.model, forced, write)
    if not bool(added.any()):
        return None
    keys = Direction(_states(case.model, forced, read), read, case.model.id)
    unlike = token_rows(case.model, texts, site=read)
    k = min(RANK, *added.shape, keys.vectors.shape[1])
    return fit_edit(keys, Direction(added, write, case.model.id), unrelated=unlike, k=k, ridge=RIDGE)


def edited(case: Case, edit: RankEdit) -> Push:
    """The edit as a push: a copy of the model."""
    layer = edit.reads.site.layer
    assert layer is not None
    model = edit.to_weights(case.model)
    pairs = zip(model.hooked.named_parameters(), case.model.hooked.parameters(), strict=True)
    here = [(new, old) for (name, new), old in pairs if f"blocks.{layer}." in name and not torch.equal(new, old)]
    change, whole = (sum(float(each.detach().double().square().sum()) for each in part) ** 0.5
                     for part in ([new - old for new, old in here], [old for _, old in here]))  # fmt: skip
    share = 100 * change / whole if whole else 0.0
    size = f"rank {edit.rank} in the MLP of block {layer}, {share:.0f} % of that matrix's norm"
    return Push("weight edit", size, model, case.plain, layer=layer)


# ---- shared ----


def score(case: Case, push: Push, rows: Sequence[int]) -> dict[str, float]:
    """What is gained on some requests, in the terms of `chosen_vector`, but with greedy completions.

    Returns:
        `target`, the share of completions that show the behaviour (without a judge: minus the cross entropy of the
        reference completions); `rise` of the cross entropy of what the model says by itself, in nats a token; and
        `score`, target - WEIGHT * rise.
    """
    rows = list(rows)

    def entropy(on: Push, ids: Sequence[Sequence[int]]) -> float:
        completed = on.prompts[rows].with_completions([list(each) for each in ids])
        found = sweep(
            on.model, completed, axes={}, build=lambda: on.interventions, measure=CE.named("ce"), progress=False
        )["ce"].values
        weight = weights(completed)
        return float(found @ weight / weight.sum())

    own = completion_ids(case.unsteered[rows])
    rise = entropy(push, own) - entropy(nothing(case), own)
    if case.judge is None:
        target = -entropy(push, completion_ids(case.reference[rows]))
    else:
        done = push.model.generate(
            push.prompts[rows], max_new_tokens=case.max_new_tokens, interventions=push.interventions, progress=False
        )
        target = float(case.judge.many(done.completions).mean())
    return {"target": target, "rise": rise, "score": target - WEIGHT * rise}


def unrelated(case: Case, use: str, n: int | None = None) -> Prompts:
    """Plain documents from the pocket model's grammar that do not show the behaviour: the first token as the prompt, so
    that every push can stand before it, and the rest as the completion.

    Args:
        case: whose tokenizer and judge.
        use: other documents for each use, always the same.
        n: how many; None for `TEXTS`.
    """
    n = TEXTS if n is None else n
    rng, tokenizer = random.Random(f"unrelated text {use}"), case.model.tokenizer
    room = case.model.n_ctx - int(case.prefixed.span("prefix").sum(1).max()) - 2
    most = max(2, min(TEXT_TOKENS, room))
    bos = getattr(tokenizer, "bos_token_id", None)
    rows: list[list[int]] = []
    while len(rows) < n:
        text = sample_document(rng)
        ids = tokenizer.encode(text, add_special_tokens=False)[:most]
        if len(ids) > 1 and not (case.judge is not None and case.judge(text)):
            rows.append(ids)
    starts = [[*([] if bos is None else [bos]), row[0]] for row in rows]
    return case.model.prompts(Prompts.from_ids(starts, tokenizer=tokenizer, completions=[row[1:] for row in rows]))


def _states(model: Model, prompts: Prompts, site: Site) -> Float[Tensor, "token d"]:
    """Activations of the tokens that predict the completions."""
    run = model.run(prompts, record=[site], logits="none")
    return run.activations[site][predicting(run.prompts, "completion")].detach()


def _layers(case: Case, depths: Iterable[float]) -> list[int]:
    return list(dict.fromkeys(round(depth * (case.model.n_layers - 1)) for depth in depths))


def _tokens(n: int) -> str:
    return f"{n} token{'' if n == 1 else 's'}"
