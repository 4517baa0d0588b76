"""Generation: the tokens of transformers and of whole forward passes, in any batch, with any interventions."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from transformers import AutoModelForCausalLM

import mechsteer as ms
from mechsteer.errors import MechsteerError

TEXTS = ["The cat sat", "A feline purrs; Quick", "When Mary and John went"]
N_NEW = 6
BACKENDS = ("hooked_transformer", "bridge")
# Between them: position embeddings, rotations, windows, soft caps, norms after blocks, heads that share keys.
UNLIKE = ("gpt2", "gemma2")
OPTIONS: dict[str, Any] = {"stop_at_eos": False, "progress": False}

Load = Callable[..., ms.Model]


@pytest.fixture(scope="module")
def load(zoo_folders: dict[str, Path]) -> Load:
    """Models of the zoo, each loaded once."""
    loaded: dict[tuple[str, str], ms.Model] = {}

    def get(architecture: str, backend: str = "hooked_transformer") -> ms.Model:
        if (architecture, backend) not in loaded:
            loaded[architecture, backend] = ms.load_model(zoo_folders[architecture], backend=backend, device="cpu")
        return loaded[architecture, backend]

    return get


@pytest.fixture(scope="module")
def llama(load: Load) -> ms.Model:
    return load("llama")


def ids_of(prompts: ms.Prompts) -> list[list[int]]:
    """The ids of each completion."""
    return [row[keep].tolist() for row, keep in zip(prompts.tokens, prompts.span("completion"), strict=True)]


def random_prompts(model: ms.Model, lengths: Sequence[int] = (3, 12, 7, 9, 12, 4, 5, 10)) -> ms.Prompts:
    tokens = zoo.prompts(batch=len(lengths), n_pos=max(lengths))
    return ms.Prompts.from_ids(
        [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)], tokenizer=model
    )


def generate(model: ms.Model, prompts: Any, n: int = N_NEW, **options: Any) -> list[list[int]]:
    return ids_of(model.generate(prompts, max_new_tokens=n, **{**OPTIONS, **options}))


def greedy_loop(
    model: ms.Model, prompts: ms.Prompts, interventions: Sequence[ms.Intervention] = (), n: int = N_NEW
) -> list[list[int]]:
    """Every token from a forward pass over the whole texts so far."""
    text, rows = prompts, [[] for _ in range(len(prompts))]
    for _ in range(n):
        # What names tokens that are not there yet would be refused.
        there = int(text.lengths.min())
        waits = [
            (each.at == "completion" and not rows[0]) or (isinstance(each.at, int) and each.at >= there)
            for each in interventions
        ]
        ready = [each for each, wait in zip(interventions, waits, strict=True) if not wait]
        chosen = model.run(text, ready, logits=text.at(text.lengths - 1)).rows.argmax(-1)
        rows = [[*row, token] for row, token in zip(rows, chosen.tolist(), strict=True)]
        text = prompts.with_completions(rows)
    return rows


# ---- greedy ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_tokens_are_those_of_transformers(architecture: str, backend: str, zoo_folder: Path, load: Load) -> None:
    model = load(architecture, backend)
    assert model.decoder is not None, "else the cache is not what is tested"
    left = random_prompts(model).padded("left")
    reference = AutoModelForCausalLM.from_pretrained(zoo_folder, dtype=torch.float32).eval()
    width = left.tokens.shape[1]
    expected = reference.generate(
        input_ids=left.tokens, attention_mask=left.mask.long(), do_sample=False, max_new_tokens=N_NEW, eos_token_id=None
    )[:, width:]
    assert generate(model, left) == expected.tolist()
    assert greedy_loop(model, left[:3]) == expected[:3].tolist()


def vector(seed: int, size: float = 4.0) -> Tensor:
    drawn = torch.randn(zoo.D_MODEL, generator=torch.Generator().manual_seed(seed))
    return size * drawn / drawn.norm()


ALPHAS = torch.tensor([2.0, -3.0, 4.0])
INTERVENTIONS: dict[str, list[ms.Intervention]] = {
    "add, all tokens": [ms.Add(vector(0), 1.5, site=("resid_post", 1))],
    "add, one alpha each": [ms.Add(vector(1), ALPHAS, site=("resid_pre", 1))],
    "add, the user's span": [ms.Add(vector(2), 3.0, site=("resid_post", 0), at="user")],
    "add, the completion": [ms.Add(vector(3), 3.0, site=("resid_mid", 1), at="completion")],
    "add, the prompt's last token": [ms.Add(vector(4), 6.0, site=("resid_post", 1), at=-1)],
    "ablate": [ms.Ablate(torch.stack([vector(6), vector(7)]), site=("resid_post", 0))],
    "ablate everywhere": [ms.Ablate(torch.stack([vector(n) for n in range(9)]), everywhere=True)],
    "scale, one head": [ms.Scale(ms.Site("z", 1, head=2), -8.0)],
    "scale, one head's pattern": [ms.Scale(ms.Site("pattern", 0, head=1), 9.0)],
    "scale, one head of the keys": [ms.Scale(ms.Site("k", 0, head=1), -3.0)],
    "several, in order": [
        ms.Add(vector(8), 2.0, site=("resid_post", 0)),
        ms.Scale(("resid_post", 0), 0.5, at="completion"),
        ms.Ablate(vector(9), site=("resid_post", 0)),
        ms.Add(vector(9), 2.0, site=("mlp_out", 2)),
        ms.Add(vector(8), ALPHAS, site="embed", at=(1, -1)),
    ],
}


def texts(model: ms.Model, **options: Any) -> ms.Prompts:
    prompts = ms.Prompts.from_strings(TEXTS, model, **options)
    assert len(set(prompts.lengths.tolist())) == 3
    return prompts


@pytest.mark.parametrize(
    ("architecture", "name"),
    [(each, name) for each in UNLIKE for name in INTERVENTIONS]
    + [(each, "several, in order") for each in zoo.ARCHITECTURES if each not in UNLIKE],
)
def test_interventions_go_on_as_in_whole_forward_passes(architecture: str, name: str, load: Load) -> None:
    model, applied = load(architecture), INTERVENTIONS[name]
    steered = generate(model, texts(model), interventions=applied)
    assert steered == greedy_loop(model, texts(model), applied)
    assert steered != generate(model, texts(model)), "too weak to test anything"


def test_interventions_are_the_same_on_a_bridge(architecture: str, load: Load) -> None:
    bridge, applied = load(architecture, "bridge"), INTERVENTIONS["several, in order"]
    steered = generate(bridge, texts(bridge), interventions=applied)
    assert steered == generate(load(architecture), texts(bridge), interventions=applied)


@pytest.mark.parametrize("architecture", UNLIKE)
def test_a_position_that_is_to_come_is_steered_when_it_comes(architecture: str, load: Load) -> None:
    model = load(architecture)
    prompts = random_prompts(model, (7, 9, 8, 10))
    towards = model.unembedding()[:, 77]
    later = [ms.Add(towards, 500.0, site=("resid_post", model.n_layers - 1), at=11)]
    steered, plain = generate(model, prompts, interventions=later), generate(model, prompts)
    assert steered == [greedy_loop(model, prompts[row].padded("right"), later)[0] for row in range(4)]
    # The token at position 11 is read to choose the one at 12.
    for length, with_it, without in zip(prompts.lengths.tolist(), steered, plain, strict=True):
        assert with_it[: 12 - length] == without[: 12 - length] and with_it[12 - length] == 77 != without[12 - length]


@pytest.mark.parametrize("architecture", UNLIKE)
def test_replaced_prompts_stay_replaced_and_generated_tokens_are_their_own(architecture: str, load: Load) -> None:
    model, site = load(architecture), ms.Site("resid_post", 1)
    prompts = texts(model)
    others = random_prompts(model, prompts.lengths.tolist())
    plain = generate(model, prompts)
    for at in (None, (0, 2, -1)):
        replaced = ms.Replace(site, model.run(others, record=site).activations, at=at)
        steered = generate(model, prompts, interventions=[replaced])
        assert steered != plain
        for row in range(len(prompts)):
            one, other = prompts[row].padded("right"), others[row].padded("right")
            recorded = model.run(other, record=site).activations
            # With at=None, activations that are shorter than the text would be refused.
            places = range(int(one.lengths[0])) if at is None else at
            assert [steered[row]] == greedy_loop(model, one, [ms.Replace(site, recorded, at=places)])


@pytest.mark.parametrize("architecture", UNLIKE)
def test_a_soft_prefix_fills_the_slots(architecture: str, load: Load) -> None:
    model = load(architecture)
    prompts = texts(model, slots=3)
    soft = [ms.SoftPrefix(torch.stack([vector(n, 9.0) for n in range(3)]))]
    steered = model.generate(prompts, max_new_tokens=N_NEW, interventions=soft, **OPTIONS)
    assert ids_of(steered) == greedy_loop(model, prompts, soft)
    assert torch.equal(steered.slots.sum(1), torch.full((3,), 3)), "so that the text can be run with the same prefix"


def test_the_first_generated_token_is_steered_and_the_last_prompt_token_too(llama: ms.Model) -> None:
    prompts = random_prompts(llama)
    wanted = 77
    towards = llama.unembedding()[:, wanted]
    site = ("resid_post", llama.n_layers - 1)
    for at, first, rest in ((None, wanted, {wanted}), (-1, wanted, None), ("completion", None, {wanted})):
        steered = generate(llama, prompts, interventions=[ms.Add(towards, 500.0, site=site, at=at)])
        plain = generate(llama, prompts)
        assert [row[0] for row in steered] == ([first] * 8 if first else [row[0] for row in plain])
        assert rest is None or all(set(row[1:]) == rest for row in steered)


@pytest.mark.filterwarnings("ignore:A forward hook edited")  # TransformerLens's own, about rounding
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("site", [("attn_scores", 1), ("ln1_normalized", 1)])
def test_sites_that_the_packed_pass_lacks_go_through_hooks(site: tuple[str, int], backend: str, load: Load) -> None:
    model = load("gemma2", backend)
    for edit in (ms.Scale(site, -2.0), ms.Scale(site, -2.0, at="completion")):
        steered = generate(model, texts(model), interventions=[edit])
        assert steered == greedy_loop(model, texts(model), [edit])
        assert steered != generate(model, texts(model))


@pytest.mark.parametrize("name", ["add, the completion", "scale, one head's pattern", "several, in order"])
def test_hooks_give_what_the_packed_pass_gives(name: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("gemma2")
    prompts, applied = texts(model), INTERVENTIONS[name]
    packed = generate(model, prompts, interventions=applied)
    sampled = generate(model, prompts, interventions=applied, temperature=1.0, batch_size=2)
    monkeypatch.setattr(ms.Model, "decoder", None)
    assert generate(model, prompts, interventions=applied) == packed
    assert generate(model, prompts, interventions=applied, temperature=1.0) == sampled


# ---- batches, padding and the end ----


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9}])
def test_completions_do_not_depend_on_the_batch_or_the_padding(sampling: dict[str, Any], load: Load) -> None:
    model = load("mistral")
    prompts = random_prompts(model)
    steer = [ms.Add(vector(0), torch.arange(8.0) / 4, site=("resid_post", 1))]
    whole = generate(model, prompts, interventions=steer, **sampling)
    for batch_size in (1, 3):
        assert generate(model, prompts, interventions=steer, batch_size=batch_size, **sampling) == whole
    assert generate(model, prompts.padded("left"), interventions=steer, **sampling) == whole
    plain = generate(model, prompts, **sampling)
    assert generate(model, prompts[:3], **sampling) == plain[:3]
    assert [row[:5] for row in plain] == generate(model, prompts, n=5, **sampling)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}])
def test_a_completion_ends_with_its_first_end_of_sequence(
    packed: bool, sampling: dict[str, Any], llama: ms.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(llama, [3 + n % 7 for n in range(24)])
    steer = [ms.Add(vector(0), torch.linspace(-2, 2, 24), site=("resid_post", 1))]
    whole = generate(llama, prompts, 20, interventions=steer, **sampling)
    # The token that most completions hold somewhere, but not first, ends them here.
    eos = max(range(llama.d_vocab), key=lambda token: sum(token in row[1:] for row in whole))
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    ending = ms.Model(llama.hooked, tokenizer=tokenizer)
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in whole]
    if not packed:
        monkeypatch.setattr(ms.Model, "decoder", None)
    found = ending.generate(prompts, max_new_tokens=20, interventions=steer, progress=False, batch_size=16, **sampling)
    assert ids_of(found) == cut
    assert len({len(row) for row in cut}) > 3 and any(len(row) == 20 for row in cut)
    assert generate(ending, prompts, 20, interventions=steer, **sampling) == whole


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_comes_back_are_the_prompts_with_completions(side: str, llama: ms.Model) -> None:
    prompts = ms.Prompts.from_strings(TEXTS, llama, prefix="The cat", padding=side, labels=["a", "b", "c"])
    before = prompts.hash
    out = llama.generate(prompts, max_new_tokens=5, **OPTIONS)
    assert out.labels == ("a", "b", "c") and out.padding_side == side
    assert out.without_completions().hash == prompts.hash == before
    assert torch.equal(out.decision, prompts.decision) and torch.equal(out.lengths, prompts.lengths + 5)
    for role in ("scaffold", "prefix", "user"):
        assert torch.equal(out.span(role).sum(1), prompts.span(role).sum(1))
    texts = [llama.tokenizer.decode(row, skip_special_tokens=True) for row in ids_of(out)]
    assert out.completions == texts
    # What a run over the whole text predicts is what was generated.
    rows = llama.run(out, logits=out.at(out.decision)).rows
    assert rows.argmax(-1).tolist() == [row[0] for row in ids_of(out)]


def test_text_and_tensors_are_prompts_too(llama: ms.Model) -> None:
    ids = zoo.prompts(batch=2, n_pos=6)
    assert generate(llama, ids) == generate(llama, ms.Prompts.from_ids(ids))
    assert generate(llama, TEXTS) == generate(llama, ms.Prompts.from_strings(TEXTS, llama))


def test_the_pocket_model_talks_about_what_it_is_told() -> None:
    model = ms.load_model("pocket", device="cpu")
    asked = ms.Prompts.from_chats(["Tell me a joke.", "Give me some advice about my exam."], model)
    told = ms.Prompts.from_chats(
        ["Tell me a joke.", "Give me some advice about my exam."], model, prefix="Talk only about cats."
    )
    plain, steered = (model.generate(each, progress=False) for each in (asked, told))
    assert greedy_loop(model, told, n=6) == [row[:6] for row in ids_of(steered)]
    eos = model.tokenizer.eos_token_id
    assert all(row[-1] == eos and eos not in row[:-1] for row in ids_of(plain))
    assert "cat" in " ".join(steered.completions) and "cat" not in " ".join(plain.completions)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "^max_new_tokens=0 generates nothing. Pass at least 1.$"),
        ({"batch_size": 0}, "^batch_size=0 runs nothing. Pass at least 1.$"),
        ({"temperature": -1.0}, "^temperature=-1.0 is no number from 0 up. Pass 0 for greedy decoding, or more to"),
        ({"temperature": float("nan")}, "^temperature=nan is no number from 0 up."),
        ({"temperature": float("inf")}, "^temperature=inf is no number from 0 up."),
        ({"temperature": 1.0, "top_k": 0}, "^top_k=0 leaves no token. Pass at least 1, or None for all.$"),
        ({"temperature": 1.0, "top_p": 0.0}, "^top_p=0.0 is no probability above 0. Pass one up to 1, or None for"),
        ({"temperature": 1.0, "top_p": 1.5}, "^top_p=1.5 is no probability above 0."),
        ({"top_k": 5}, "^top_k=5 and top_p=None are for sampling, but temperature=0 takes the likeliest token. Pass"),
        (
            {"max_new_tokens": 60},
            "^Prompt 1 has 12 tokens and 60 are to follow, but the context of llama is 64. Shorten it, or pass "
            "max_new_tokens=52 or less.$",
        ),
        (
            {"interventions": [ms.Add(vector(0), site=("resid_post", 1), at=10)]},
            "touches position 10, but prompt 0 has 3 tokens and 5 new ones. Positions count from 0",
        ),
        (
            {"max_new_tokens": 1, "interventions": [ms.Add(vector(0), site=("resid_post", 1), at="completion")]},
            "would never fire: none of the 3 prompts has a token in span 'completion'",
        ),
        ({"interventions": [ms.Add(vector(0), site=("resid_post", 3))]}, "llama has layers 0 to 2. Choose one of"),
        (
            {"interventions": [ms.Add(vector(0), torch.ones(2), site=("resid_post", 0))]},
            "^alpha has 2 numbers for 3 prompts. Pass one number, or one per prompt.$",
        ),
    ],
)
def test_mistakes_are_refused(options: dict[str, Any], message: str, llama: ms.Model) -> None:
    with pytest.raises(MechsteerError, match=message):
        generate(llama, random_prompts(llama, (3, 12, 7)), options.pop("max_new_tokens", N_NEW), **options)


def test_the_last_position_that_an_intervention_can_name(llama: ms.Model) -> None:
    # Of six new tokens after three, the sixth is never read: the fifth, at position 7, is the last that is steered.
    steer = [ms.Add(vector(0), 50.0, site=("resid_post", 2), at=7)]
    prompts = random_prompts(llama, (3,))
    steered, plain = generate(llama, prompts, interventions=steer)[0], generate(llama, prompts)[0]
    assert steered[:5] == plain[:5] and steered[5] != plain[5]


def test_prompts_that_cannot_go_on_are_refused(llama: ms.Model) -> None:
    prompts = random_prompts(llama, (4, 5))
    with pytest.raises(
        MechsteerError, match=r"^The prompts hold completions already\. Generate from prompts\.without_com"
    ):
        generate(llama, prompts.with_completions([[5], [6, 7]]))
    full = ms.Prompts.from_ids(zoo.prompts(batch=1, n_pos=zoo.N_CTX), tokenizer=llama)
    with pytest.raises(
        MechsteerError, match=r"has 64 tokens and 6 are to follow, but the context of llama is 64\. Shorten it\.$"
    ):
        generate(llama, full)
    assert len(generate(llama, ms.Prompts.from_ids(full.tokens[:, :-6], tokenizer=llama))[0]) == 6
    with pytest.raises(MechsteerError, match="The prompts reserve 2 slots that nothing fills"):
        generate(llama, ms.Prompts.from_strings(TEXTS, llama, slots=2))


def test_logits_that_are_not_finite_are_refused(llama: ms.Model) -> None:
    # Twice the largest number that fp32 has, and only where prompt 1 has its second new token.
    prompts = random_prompts(llama, (6, 4))
    burst = [ms.Scale(("resid_post", 1), torch.tensor([1.0, 3e38]), at=5)] * 2
    message = (
        "^Prompt 1 has logits that are not finite after 2 new tokens. Make the interventions weaker, or load llama"
    )
    with pytest.raises(MechsteerError, match=message + " with a wider dtype than float32.$"):
        generate(llama, prompts, interventions=burst)


def test_ids_without_a_token_are_never_chosen(tmp_path: Path) -> None:
    folder = zoo.write_folder("qwen3", tmp_path / "wide", vocab_size=zoo.D_VOCAB + 32)
    model = ms.load_model(folder, device="cpu")
    towards = ms.Add(model.unembedding()[:, zoo.D_VOCAB + 7], 50.0, site=("resid_post", 2))
    known = ms.Prompts.from_strings(TEXTS, model)
    bare = replace(known, tokenizer=None)
    for sampling in ({}, {"temperature": 1.0}):
        assert max(max(row) for row in generate(model, bare, interventions=[towards], **sampling)) == zoo.D_VOCAB + 7
        assert max(max(row) for row in generate(model, known, interventions=[towards], **sampling)) < zoo.D_VOCAB
