"""`mechsteer features`: which features of a sparse autoencoder a prefix moves."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from mechsteer.cli import options, terminal
from mechsteer.cli.answers import Answer, Command, case_of, identity, settings_of
from mechsteer.errors import MechsteerError

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

    from mechsteer.study.log import Log
    from mechsteer.study.settings import Settings

RANKINGS = ("contrast", "attribution", "similarity")
EPILOG = options.epilog(
    'mechsteer features "Talk only about cats." --out cats-features',
    'mechsteer features "Sound gloomy." --top 12 --sort attribution --out gloomy-features',
    "mechsteer features --prefix mine.txt --model ./my-model --sae ./my-sae --out mine",
    after="An autoencoder is a folder in SAELens's format.",
    s1="",
)


def features(
    text: options.Text = None,
    sae: Annotated[
        str | None, typer.Option(help="The autoencoder's folder. Default: the shipped one that fits the model.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Features of each ranking.")] = 6,
    sort: Annotated[
        str,
        typer.Option(
            help='The table\'s order: "contrast", what the prefix raises; "attribution", what its effect hangs on; '
            '"similarity", what resembles its vector.',
            autocompletion=options.one_of(*RANKINGS),
        ),
    ] = "contrast",
    out: options.Out = Path("features"),
    *,
    question: options.Question,
    running: options.Running,
) -> None:
    """Rank the features of a sparse autoencoder in three ways: which a prefix raises, uses and resembles."""
    options.choice(sort, RANKINGS, "--sort")
    about = options.prefix_of(text, question.prefix)
    settings = settings_of(about, question, running)
    asked = identity(settings) | {"sae": sae, "top": top, "sort": sort}

    def work(log: "Log", folder: Path) -> Answer:
        return _ranked(settings, asked, log, folder)

    Command("features", f'Features of "{about}"', out.expanduser(), asked, running).run(work, _shown)


def _ranked(settings: "Settings", asked: Mapping[str, Any], log: "Log", folder: Path) -> Answer:
    from mechsteer.backends.autoencoder import SHIPPED_SAES, load_sae
    from mechsteer.result import Result, provenance
    from mechsteer.study.autoencoder import autoencoder
    from mechsteer.study.chapters.features import ranked

    case = case_of(settings, log, folder)
    name = asked["sae"]
    if name is not None and name not in SHIPPED_SAES and not Path(name).is_dir():
        raise MechsteerError(f"--sae {name} is no folder: give one in SAELens's format, or leave it out")
    log.line("looking for a sparse autoencoder of the model" if name is None else f"loading the autoencoder {name}")
    if name is None:
        sae, _ = autoencoder(case)
    else:
        sae = load_sae(name, model=case.model, device=case.model.device.type)
    log.line(f"ranking {sae.n_features:,} features in three ways")
    data, _ = ranked(case, sae, case.with_reference(case.plain), most=asked["top"])
    data = data.sortby(f"{asked['sort']}_rank")
    data = data.assign_coords(feature_token=("feature", [str(each) for each in data["feature"].values]))
    made = provenance(model=case.model.id, seed=settings.seed, sae=sae.name, sae_hash=sae.hash, prefix=settings.prefix)
    rows = [
        {"feature": int(feature)}
        | {str(key): each.values[place].item() if hasattr(each.values[place], "item") else each.values[place]
           for key, each in data.data_vars.items()}
        for place, feature in enumerate(data["feature"].values)
    ]  # fmt: skip
    summary = {
        "prefix": settings.prefix, "model": case.model.id._asdict(), "sort": asked["sort"],
        "sae": {"name": sae.name, "site": str(sae.site), "features": sae.n_features, "hash": sae.hash},
        "requests": len(case.rows("search")), "features": rows,
    }  # fmt: skip
    return Answer(summary, {"features": Result(data, provenance=made)}, _figures(data), _lead(summary))


def _figures(data: "xr.Dataset") -> "list[go.Figure]":
    """The difference and the attribution of every feature, with their intervals."""
    import plotly.graph_objects as go

    from mechsteer.plots import plain, theme
    from mechsteer.plots.themes import PALETTE

    about = {
        "difference": ("Contrast: activation with the prefix minus without it", "feature activation"),
        "attribution": ("Attribution: what the log-likelihood gains when the feature goes there", "nats a token"),
    }
    labels = [
        plain(f"{feature} ({promotes})") if promotes else str(feature)
        for feature, promotes in zip(data["feature"].values, data["promotes"].values, strict=True)
    ]
    figures = []
    for (name, (title, units)), colour in zip(about.items(), PALETTE, strict=False):
        value, low, high = (data[f"{name}{end}"].values.astype(float) for end in ("", "_low", "_high"))
        error = {"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low}
        bars = go.Bar(x=value, y=labels, orientation="h", error_x=error, marker={"color": colour}, name=name)
        figure = theme(go.Figure(bars)).update_layout(
            title_text=title, height=140 + 26 * len(labels), margin={"l": 280}, showlegend=False
        )
        figure.update_xaxes(title_text=units).update_yaxes(autorange="reversed", type="category")
        figures.append(figure)
    return figures


def _lead(summary: Mapping[str, Any]) -> str:
    sae, first = summary["sae"], summary["features"][0]
    return (
        f"{sae['features']:,} features of {sae['name']} at {sae['site']}. First by {summary['sort']} is feature "
        f"{first['feature']} ({first['promotes']}): {first['with']:.2f} on average over the reference completions with "
        f"the prefix and {first['without']:.2f} over the same without it, on {summary['requests']} requests."
    )


def _shown(summary: Mapping[str, Any]) -> list[RenderableType]:
    rows = []
    for row in summary["features"]:
        difference, attribution = (
            f"{row[name]:.{digits}f} ({row[f'{name}_low']:.{digits}f} to {row[f'{name}_high']:.{digits}f})"
            for name, digits in (("difference", 1), ("attribution", 2))
        )
        ranks = ", ".join(str(row[f"{name}_rank"]) for name in RANKINGS)
        rows.append([row["feature"], row["promotes"], difference, attribution, f"{row['cosine']:.2f}", ranks])
    columns = ("feature", "promotes", "contrast (95 %)", "attribution (95 %)", "cosine", "ranks")
    note = Text("contrast: activation with the prefix minus without; attribution: nats a token; ranks: in each.", "dim")
    numbers = ("feature", "contrast (95 %)", "attribution (95 %)", "cosine")
    return [Text(_lead(summary)), terminal.table(columns, rows, numbers=numbers, whole=("ranks",)), note]
