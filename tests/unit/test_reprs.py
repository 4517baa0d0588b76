"""What people see of the nouns: short texts, and HTML that is harmless, cheap, and there for every public noun."""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch
import xarray as xr

import mechsteer as ms
from mechsteer import markup
from mechsteer import model as model_module
from mechsteer.activations import ModelId, SiteMap
from mechsteer.judges import Judge
from mechsteer.plots import plain
from mechsteer.prefix import FoundPrefix, FoundSoft, Hardened, MatchedPrefix
from mechsteer.propagator import RankEdit, gap_gradient, prompt_vector, search_tokens
from mechsteer.recording.reader import TokenRows, TopK
from mechsteer.result import provenance
from mechsteer.site import KINDS, KindName
from mechsteer.strength import ChosenAlpha, Concept
from mechsteer.study import Settings, Study, as_requests

HOSTILE = "<script>alert(1)</script>\"><img src=x onerror=y>'<b>$x$</b>&amp;\u202e\u2066\ud800\n"
SITE = ms.Site("resid_post", 0)


@cache
def model() -> ms.Model:
    return ms.load_model("pocket-1l", device="cpu")


@cache
def prompts() -> ms.Prompts:
    return ms.Prompts.from_chats(["Tell me about your day.", "Write a poem."], model(), prefix="Talk only about cats.")


@cache
def run() -> ms.Run:
    return model().run(prompts(), record=["resid_post", "pattern"])


def direction(name: str = "pocket-1l") -> ms.Direction:
    vector = torch.linspace(-1, 1, model().d_model)
    return ms.Direction(vector, SITE, ModelId(name, model().id.hash, False), {"method": "test", "of": {"method": name}})


def chosen() -> ChosenAlpha:
    numbers = {"alpha": 1.5, "low": 1.0, "high": 2.0, "gain": 0.5, "gain_error": 0.1, "forward_passes": 12}
    data = xr.Dataset({name: ("direction", [value]) for name, value in numbers.items()}, {"direction": ["cats"]})
    data["works"] = ("direction", [True])
    return ChosenAlpha(ms.Result(data, provenance=provenance(weight=0.1, at=None, objective="judge")), {})


def study() -> Study:
    settings = Settings.of(
        model="pocket-1l", prefix="Talk only about cats.", requests=as_requests(["Hi", "Hello"], seed=0)
    )
    return Study(Path("nowhere"), settings, model().id, {}, {"behaviour": "it failed"})


def recording(folder: Path) -> ms.Recording:
    return ms.record_stream(model(), prompts(), SITE, folder, progress=False)


def grid() -> ms.Result:
    data = xr.Dataset({"effect": (("layer", "pos"), np.eye(3)), "low": (("layer", "pos"), np.eye(3))})
    return ms.Result(data, provenance=provenance(model=model().id, seed=1))


def gap() -> ms.LogitGap:
    return ms.LogitGap(" cats", " dogs", tokenizer=model())


NOUNS: dict[str, Callable[[], Any]] = {
    "Ablate": lambda: ms.Ablate(direction()),
    "Activations": lambda: run().activations,
    "Add": lambda: ms.Add(direction(), 2.0, at="user"),
    "ChosenAlpha": chosen,
    "Concept": lambda: Concept("cats", ["The cats purr."], ["Dogs bark."] * 5, ["cat"]),
    "Direction": direction,
    "KLFromBaseline": lambda: ms.KLFromBaseline(run()),
    "FeatureActivation": lambda: ms.FeatureActivation(ms.load_sae("pocket"), 3),
    "Judge": lambda: Judge.by_test("cats", "name a cat", ("cat",), lambda text: "cat" in text),
    "LogitGap": gap,
    "Model": model,
    "Plan": lambda: ms.plan_sweep("pocket", axes={"layer": 6}),
    "Projection": lambda: ms.Projection(direction()),
    "Prompts": prompts,
    "Propagator": lambda: ms.Propagator(model(), prompts(), "embed", SITE),
    "RankEdit": lambda: RankEdit(ms.Direction(torch.ones(4, 8).tril()[:1], ms.Site("mlp_post", 0)), direction()),
    "Replace": lambda: ms.Replace(SITE, run().activations, at=-1),
    "Result": grid,
    "Run": run,
    "Shape": lambda: ms.Shape.of("pocket"),
    "SetFeature": lambda: ms.SetFeature(ms.load_sae("pocket"), [3, 5], [1.0, 2.0]),
    "Scale": lambda: ms.Scale("blocks.0.attn.hook_z[head=1]", torch.tensor([0.5, 2.0])),
    "Site": lambda: ms.Site("z", 0, head=1),
    "SoftPrefix": lambda: ms.SoftPrefix(torch.zeros(3, model().d_model)),
    "SparseAutoencoder": lambda: ms.load_sae("pocket"),
    "StateMatch": lambda: ms.StateMatch(run().activations, SITE),
    "Study": study,
    "Sum": lambda: gap() - 0.1 * ms.KLFromBaseline(run()),
    "TeacherForcedCE": ms.TeacherForcedCE,
    "TokenProb": lambda: ms.TokenProb(range(20)),
}


def found() -> FoundPrefix:
    trajectory = ms.Result(xr.Dataset({"loss": ("evaluated", [3.0, 1.0])}))
    return FoundPrefix((5, 6), "a <b>cat", 1.0, trajectory, 2, (True, True), "beam")


def soft() -> FoundSoft:
    history = xr.Dataset({"loss": (("step", "restart"), [[3.0], [0.5]])})
    return FoundSoft(
        torch.zeros(1, 2, 4), torch.tensor([0.5]), ms.Result(history, provenance=provenance(ended="steps")), model().id
    )


def stages() -> ms.Result:
    values = {"loss": ("stage", [0.5, 3.0, 2.0, 1.0]), "evaluated": ("stage", [0, 4, 40, 99])}
    coordinates = {"stage": ["soft", "projected", "beam", "final"]}
    return ms.Result(xr.Dataset(values | {"text": ("stage", ["", "b", "a dog", "a <b>cat"])}, coordinates))


# What calls give that is in no list of public names.
GIVEN: dict[str, Callable[[], Any]] = {
    "EmbeddingGradient": lambda: gap_gradient(model(), prompts(), measure=gap(), progress=False),
    "Estimate": lambda: ms.Propagator(model(), prompts(), "embed", SITE).trace(),
    "FoundPrefix": found,
    "Hardened": lambda: Hardened((5, 6), "a cat", 0.5, 2.0, 1.0, 40, ms.Result(xr.Dataset())),
    "MatchedPrefix": lambda: MatchedPrefix(soft(), found(), stages()),
    "FoundSoft": soft,
    "FoundTokens": lambda: search_tokens(model(), prompts(), measure=gap(), n_tokens=1, progress=False),
    "Mean": lambda: ms.Propagator(model(), prompts(), "embed", SITE).mean(),
    "PromptVector": lambda: prompt_vector(model(), prompts(), [5, 6]),
    "Sites": lambda: model().sites,
    "SiteMap": lambda: run().activations.mean(),
    "SVD": lambda: ms.Propagator(model(), prompts(), "embed", SITE).svd(2),
    "Transposed": lambda: ms.Propagator(model(), prompts(), "embed", SITE).T,
    "completions": lambda: model().generate(prompts(), max_new_tokens=3, progress=False),
    "Pair": lambda: prompts().paired(dogs()),
}


def dogs() -> ms.Prompts:
    return ms.Prompts.from_chats(["Tell me about your day.", "Write a poem."], model(), prefix="Talk only about dogs.")


class Tags(HTMLParser):
    """The elements of a page, and the names of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


OURS = {"div", "span", "b", "br", "table", "thead", "tbody", "tr", "td", "th", "details", "summary", "a"}


def harmless(page: str) -> Tags:
    """The page, of which nothing is an element or attribute that it should not have, in characters that files hold."""
    page.encode("utf-8")
    assert not set("\u202e\u2066") & set(page)
    found = Tags(page)
    assert found.tags <= OURS and found.attributes <= {"style", "title", "href", "target"}, page
    return found


def public_classes() -> set[str]:
    """Names of the classes that the package and its rooms offer, without errors and what is only a type."""
    found = {}
    for room in ("", ".judges", ".interventions", ".objectives", ".propagator", ".recording", ".strength", ".study"):
        home = importlib.import_module(f"mechsteer{room}")
        found |= {name: getattr(home, name) for name in home.__all__}
    plain_values = {
        "ModelId",
        "TokenRows",
        "TopK",
        "TokenSet",
        "Settings",
        "Request",
        "Findings",
        "Chapter",
    }
    return {
        name
        for name, each in found.items()
        if inspect.isclass(each)
        and not issubclass(each, Exception)
        and not inspect.isabstract(each)
        and name not in plain_values
    }


def test_every_public_noun_is_in_the_list() -> None:
    assert public_classes() - {"Recording", "RayExecutor"} <= set(NOUNS), "add it to NOUNS, with both reprs"


@pytest.mark.parametrize("name", [*NOUNS, *GIVEN])
def test_nouns_have_a_short_text_and_a_card(name: str) -> None:
    noun = (NOUNS | GIVEN)[name]()
    text = repr(noun)
    assert "tensor(" not in text and "object at 0x" not in text and "array(" not in text
    assert len(text) < 700 and len(text.splitlines()) <= (1 if name != "Activations" else 1 + len(noun))
    page = noun._repr_html_()
    assert type(noun).__name__.lstrip("_") in page
    if name != "Result":  # whose tables are xarray's
        harmless(page)


def test_recordings_and_rows_have_both(tmp_path: Path) -> None:
    made = recording(tmp_path / "made")
    page = harmless(made._repr_html_()).text
    assert f"{made.n_tokens:,} tokens of 2 prompts, complete" in page and "blocks.0.hook_resid_post" in page
    rows = next(iter(made.batches(SITE)))
    assert repr(rows).startswith("TokenRows(values=float32 [") and isinstance(rows, TokenRows)
    few = torch.zeros(2, 3)
    assert repr(TopK(few, few, few, few)).startswith("TopK(values=float32 [2, 3], ")


# --- escaping


def test_all_text_is_escaped() -> None:
    named = ms.Model(model().hooked, tokenizer=model().tokenizer, name=HOSTILE)
    identity = ModelId(HOSTILE, "0" * 64, False)
    ids = ms.Prompts.from_strings(
        [HOSTILE.encode("utf-8", "replace").decode() + "x", "Hi"], model(), labels=[HOSTILE, "2"]
    )
    acts = named.run(ids, record="resid_post")
    nouns = [
        named, named.sites, ids, acts, acts.activations, direction(HOSTILE), ms.Add(direction(HOSTILE)),
        gap().named(HOSTILE), gap().named(HOSTILE) + gap(), Concept(HOSTILE, [HOSTILE], [HOSTILE], [HOSTILE]),
        Judge.by_test(HOSTILE, HOSTILE, (HOSTILE,), bool), ms.Propagator(named, ids, "embed", SITE),
        ms.Direction(torch.ones(3), SITE, identity, {"method": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}}),
    ]  # fmt: skip
    for noun in nouns:
        found = harmless(noun._repr_html_())
        assert "<script>alert(1)</script>" in found.text or noun is acts.activations, noun
    hurt = Study(Path(HOSTILE), study().settings, identity, {}, {HOSTILE: HOSTILE})
    assert "onerror" in harmless(hurt._repr_html_()).text


def test_figures_show_names_as_they_are() -> None:
    result = ms.Result(
        xr.Dataset({"gap": ("layer", [1.0, 2.0])}), provenance=provenance(model=ModelId(HOSTILE, "", False))
    )
    bundle = result._repr_mimebundle_()
    assert "<script>alert" not in bundle["text/html"]
    assert result._figure().layout.title.subtitle.text.startswith(plain(HOSTILE))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\nb", "a\\nb"), ("\u202e", "\\u202e"), ("\ud800", "\\ud800"), ("\x00", "\\x00"), (" é 猫 ", " é 猫 ")],
)
def test_what_does_not_print_is_an_escape(text: str, shown: str) -> None:
    assert markup.printable(text) == shown == str(markup.shown(text))


def test_words_about_values_are_short() -> None:
    assert markup.brief(torch.zeros(2, 3)) == "float32 [2, 3]" and markup.brief(np.zeros(4)) == "float64 [4]"
    assert markup.brief("x" * 500) == "'" + "x" * 118 + "…" and markup.brief(0.1 + 0.2) == "0.3"
    assert [markup.size(n) for n in (12, 1500, 2_500_000, 3_000_000_000)] == ["12 B", "1.5 kB", "2.5 MB", "3 GB"]


# --- cheap


def test_no_card_runs_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    nouns = [make() for make in (NOUNS | GIVEN).values()]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a repr ran the model")

    for name in ("forward", "run", "states_at", "generate"):
        monkeypatch.setattr(ms.Model, name, fail)
    monkeypatch.setattr(type(model().hooked), "forward", fail)
    monkeypatch.setattr(torch.autograd, "grad", fail)
    for noun in nouns:
        assert repr(noun) and noun._repr_html_()


def test_the_weights_of_a_large_model_are_not_read_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    large = ms.Model(model().hooked, tokenizer=model().tokenizer)
    monkeypatch.setattr(model_module, "_SMALL", 10)
    monkeypatch.setattr(model_module.backends, "weights_hash", lambda hooked: pytest.fail("read the weights"))
    assert "see model.id" in large._repr_html_()


def test_nearest_tokens_are_those_of_a_model_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    known = direction()
    page = harmless(known._repr_html_()).text
    assert "nearest tokens" in page
    assert all(text in page for text, _ in known.nearest_tokens(model(), 8))
    stranger = ms.Direction(known.vectors, SITE, ModelId("other", "f" * 64, False))
    nobody = ms.Direction(known.vectors, SITE)
    several = ms.Direction(torch.eye(model().d_model)[:2], SITE, model().id)
    narrow = ms.Direction(torch.ones(5), SITE, model().id)
    zero = ms.Direction(torch.zeros(model().d_model), SITE, model().id)
    for other in (stranger, nobody, several, narrow, zero):
        assert "nearest tokens" not in other._repr_html_()
    monkeypatch.setattr("mechsteer.directions.direction._SMALL", 10)
    assert "nearest tokens" not in direction()._repr_html_()


# --- what cards say


def test_completions_stand_in_a_column_of_their_own() -> None:
    made = GIVEN["completions"]()
    page = made._repr_html_()
    assert ">completion</th>" in page and ">prompt</th>" in page
    first = harmless(page).text
    assert "".join(made.str_tokens(0)[-3:]) in first
    assert ">completion</th>" not in prompts()._repr_html_()


def test_long_prompts_are_cut_and_keep_their_positions() -> None:
    long = ms.Prompts.from_ids([list(range(5, 505)), [7, 8]], padding="left")
    page = long._repr_html_()
    assert "340 tokens" in harmless(page).text and "498 padding" in page
    assert page.count("title=") == 162
    assert 'title="position 79, user"' in page and 'title="position 420, user"' in page
    assert 'title="position 80, user"' not in page and 'title="position 499, user"' in page


def test_a_run_shows_the_likeliest_next_tokens() -> None:
    page = harmless(run()._repr_html_()).text
    last = run().logits_at(prompts().at(prompts().decision)).softmax(-1)
    for row, values in enumerate(last):
        assert f"{float(values.max()):.1%}" in page
        assert prompts().shown(values.argmax()[None])[0] in page, row
    unread = model().run(prompts(), record="embed", logits="none")
    assert "likeliest" not in unread._repr_html_() and repr(unread).startswith("Run(2 prompts, no logits, 1 sites")


def test_an_addition_says_how_long_its_push_is() -> None:
    page = harmless(ms.Add(direction(), -2.0)._repr_html_()).text
    assert f"adds a vector of length {2 * direction().norm:.4g}" in page
    assert "4 kB" not in page and repr(ms.Add(direction(), torch.ones(2))).endswith("alpha=float32 [2])")


def test_a_study_shows_its_headline_and_links_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cats & dogs"
    folder.mkdir()
    (folder / "report.html").write_text("")
    (folder / "summary.json").write_text('{"headline": [["The behaviour", "about cats", "83 %", "n = 18"]]}')
    shown = Study(folder, study().settings, model().id, {})._repr_html_()
    assert "83 %" in shown and 'href="cats%20%26%20dogs/report.html"' in shown
    (folder / "summary.json").write_text("damaged")
    assert "report.html" in harmless(Study(folder, study().settings, model().id, {})._repr_html_()).text


# --- results as figures


def test_a_result_is_its_figure_where_it_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pio.renderers, "default", "plotly_mimetype")
    drawn = grid()._repr_mimebundle_()
    figure = go.Figure(drawn["application/vnd.plotly.v1+json"])
    assert figure.data[0].type == "heatmap" and "xarray" in drawn["text/html"]  # type: ignore[union-attr]
    assert drawn["application/vnd.plotly.v1+json"]["data"][0]["z"]["shape"] == "3, 3"
    assert "seed 1" in figure.layout.title.subtitle.text and "holds effect, low" in figure.layout.title.subtitle.text
    assert figure.layout.template.layout.paper_bgcolor == "#ffffff", "reads on a dark page too"
    with pytest.raises(NotImplementedError):
        grid()._ipython_display_()
    several = ms.Result(xr.Dataset({"a": ("x", [1.0]), "b": ("x", [2.0])}))._repr_mimebundle_()
    assert set(several) == {"text/plain", "text/html"}


def test_a_renderer_with_a_script_writes_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython.display

    outputs: list[int] = []

    def record(*shown: Any, **_: Any) -> None:
        outputs.extend(len(str(getattr(each, "data", each))) for each in shown)

    for name in ("display", "display_html"):
        monkeypatch.setattr(IPython.display, name, record)
    monkeypatch.setattr(pio.renderers, "default", "plotly_mimetype+notebook")
    grid()._ipython_display_()
    assert len(outputs) == 3 and sorted(outputs)[1] < 100_000 and max(outputs) > 1_000_000
    grid()._ipython_display_()
    assert len(outputs) == 5 and max(outputs[3:]) < 100_000, "figure and numbers, without plotly.js"


# --- completion


def test_keys_complete() -> None:
    for mapping in (run().activations, run().activations.mean()):
        assert isinstance(mapping, SiteMap)
        keys = mapping._ipython_key_completions_()
        assert "blocks.0.hook_resid_post" in keys and ("resid_post", 0) in keys
        assert all(mapping[key] is not None for key in keys)
    assert model().run(prompts(), record="embed").activations._ipython_key_completions_() == ["hook_embed", "embed"]
    assert grid()._ipython_key_completions_() == ["effect", "low"]
    assert all(grid()[key] is not None for key in grid()._ipython_key_completions_())


def test_ipython_completes_sites() -> None:
    from IPython.core.completer import IPCompleter

    names = {"acts": run().activations, "model": model()}
    completer = IPCompleter(namespace=names, global_namespace={})
    completer.use_jedi = False

    def offers(text: str) -> list[str]:
        return list(completer.complete(text)[1])

    assert [each.endswith("blocks.0.hook_resid_post") for each in offers('acts["blocks.0.hook_re')] == [True]
    assert any("resid_post" in each for each in offers('acts["resi'))
    assert any(each.endswith("resid_post") for each in offers("model.sites.resid"))


def test_sites_of_a_model_are_attributes() -> None:
    sites = ms.load_model("pocket", device="cpu").sites
    assert sites.resid_post[3] == ms.Site("resid_post", 3) and sites.embed == ms.Site("embed")
    assert list(sites.z) == sites("z") and {site.kind for site in sites} == set(sites.kinds)
    assert set(sites.kinds) <= set(dir(sites)) and "pos_embed" not in dir(sites)
    with pytest.raises(AttributeError, match=r"pocket has no pos_embed\. It has embed, resid_pre, "):
        sites.pos_embed  # noqa: B018
    with pytest.raises(AttributeError, match=r"'resid_pots' is no kind of site\. pocket has embed"):
        sites.resid_pots  # noqa: B018


def test_editors_know_the_kinds() -> None:
    assert get_args(KindName) == tuple(KINDS)
    with pytest.raises(ms.MechsteerError, match=r"'resid_p' does not exist\. Nearest: .*resid_pre"):
        ms.Site("resid_p", 3)
