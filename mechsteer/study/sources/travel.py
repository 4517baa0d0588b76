"""How the numbers of "How it travels" are made again."""

SOURCES: dict[str, tuple[str, str, str]] = {
    "cards": (
        "share of the gap's change that the push brings about before layer {entry}",
        """
        summary = study.findings["travel"].summary
        summary["change"]["own"][summary["layers"].index({entry})]
        """,
        """
        from mechsteer.interventions import Replace
        from mechsteer.patching.activation import objective_of
        from mechsteer.study.chapters.travel import streams
        from mechsteer.study.fork import forks
        from mechsteer.study.measures import ratio
        from mechsteer.sweeps import sweep

        held = forks(case, case.rows("held-out")[:18])
        prefixed = streams(case.model, held.prefixed)
        put = Replace("blocks.{entry}.hook_resid_pre", prefixed[{entry}], at=-1)
        found = sweep(case.model, held.plain, axes={}, build=lambda: put, measure=held.gap.named("gap"))
        with_it, without = (objective_of(case.model, each, held.gap) for each in (held.prefixed, held.plain))
        ratio(found["gap"].values - without, with_it - without, seed=case.settings.seed).as_json
        """,
    ),
    "pushes": (
        "change of the gap, in logits, by each request's own push before each layer",
        "study.results['travel']['pushes']['change'].sel(push='own').values",
        """
        from mechsteer.interventions import Replace
        from mechsteer.patching.activation import objective_of
        from mechsteer.study.chapters.travel import streams
        from mechsteer.study.fork import forks
        from mechsteer.sweeps import sweep

        held = forks(case, case.rows("held-out")[:18])
        prefixed = streams(case.model, held.prefixed)
        found = sweep(
            case.model, held.plain, axes={"layer": range(case.model.n_layers)}, measure=held.gap.named("gap"),
            build=lambda layer: Replace(f"blocks.{layer}.hook_resid_pre", prefixed[layer], at=-1),
        )
        found["gap"].values - objective_of(case.model, held.plain, held.gap)
        """,
    ),
    "predicted": (
        "change of the gap, in logits, that the gradient before layer {entry} foretells for each request",
        "study.results['travel']['pushes']['predicted'].sel(layer={entry}).values",
        """
        import torch

        from mechsteer.propagator import Propagator
        from mechsteer.study.chapters.travel import streams
        from mechsteer.study.fork import forks

        held = forks(case, case.rows("held-out")[:18])
        push = (streams(case.model, held.prefixed) - streams(case.model, held.plain))[{entry}]
        to_gap = Propagator(case.model, held.plain, "blocks.{entry}.hook_resid_pre", held.gap, source_pos=-1)
        (to_gap.rmv(torch.ones(1)) * push).sum(-1).numpy()
        """,
    ),
    "regime": (
        "radius of the linear regime before layer {entry}, in lengths of the stream",
        "study.results['travel']['regime']['relative_radius'].sel(layer={entry}, group='prefix').item()",
        """
        import numpy as np

        from mechsteer.directions import Direction
        from mechsteer.propagator import linear_regime
        from mechsteer.site import Site
        from mechsteer.study.chapters.travel import streams
        from mechsteer.study.fork import forks

        search, held = (forks(case, case.rows(split)[:18]) for split in ("search", "held-out"))
        push = (streams(case.model, search.prefixed) - streams(case.model, search.plain))[{entry}].mean(0)
        site = Site("resid_pre", {entry})
        found = linear_regime(
            case.model, held.plain, measure=held.gap, kind="resid_pre", layers=[{entry}], at=-1, random=4,
            sizes=np.geomspace(0.01, 4, 9).tolist(), seed=case.settings.seed,
            directions={"prefix": {site: Direction(push, site, case.model.id)}},
        )
        found["relative_radius"].sel(layer={entry}, group="prefix").item()
        """,
    ),
    "identity": (
        "share of the Jacobian to the end that is not identity, before each layer and for each prompt",
        "study.results['travel']['identity']['rest'].sel(span='end').values",
        """
        from mechsteer.propagator import identity_share
        from mechsteer.study.fork import forks

        held = forks(case, case.rows("held-out")[:18])
        few = held.plain[range(min(6, len(held.rows)))]
        found = identity_share(case.model, few, random=4, spectrum=4, seed=case.settings.seed)
        found["rest"].sel(span="end").values
        """,
    ),
    "gain": (
        "gain of a random push through attention and MLP of each layer",
        "study.results['travel']['identity']['gain'].values",
        """
        from mechsteer.propagator import identity_share
        from mechsteer.study.fork import forks

        held = forks(case, case.rows("held-out")[:18])
        few = held.plain[range(min(6, len(held.rows)))]
        identity_share(case.model, few, random=4, spectrum=4, seed=case.settings.seed)["gain"].values
        """,
    ),
    "dyson": (
        "share of each order in what arrives of the push before layer {first}",
        "study.results['travel']['dyson']['share'].sel(layer={first}, vector='prefix').values",
        """
        from mechsteer.propagator import dyson
        from mechsteer.study.chapters.travel import streams
        from mechsteer.study.fork import forks

        held = forks(case, case.rows("held-out")[:18])
        few = range(min(6, len(held.rows)))
        push = (streams(case.model, held.prefixed) - streams(case.model, held.plain))[{first}]
        found = dyson(
            case.model, held.plain[few], layers={first}, vectors={"prefix": push[: len(few)]}, random=4,
            seed=case.settings.seed,
        )
        found["share"].sel(layer={first}, vector="prefix").values
        """,
    ),
    "flow": (
        "percent of the squared length before layer {first} that is still at its token at the end",
        "study.results['travel']['flow']['stays'].sel(layer={first}).transpose('pos', 'prompt').values",
        """
        from mechsteer.propagator import position_flow
        from mechsteer.study.fork import forks

        held = forks(case, case.rows("held-out")[:18])
        prompts = held.prefixed[range(min(6, len(held.rows)))]
        tokens, end = prompts.span("prefix")[0].nonzero().flatten().tolist(), case.model.n_layers - 1
        flow = position_flow(
            case.model, prompts, "blocks.{first}.hook_resid_pre", f"blocks.{end}.hook_resid_post", source_pos=tokens,
            random=4, seed=case.settings.seed,
        )
        100 * flow["same"].sel(vector="random").transpose("src", "prompt").values
        """,
    ),
    "rank": (
        "change of the gap, in logits, by what is left of each push in one direction before layer {entry}",
        "study.results['travel']['rank']['change'].sel(subspace='found', k=1).values",
        """
        from mechsteer.directions import Direction
        from mechsteer.interventions import Replace
        from mechsteer.patching.activation import objective_of
        from mechsteer.propagator import principal
        from mechsteer.site import Site
        from mechsteer.study.chapters.travel import streams
        from mechsteer.study.fork import forks
        from mechsteer.sweeps import sweep

        search, held = (forks(case, case.rows(split)[:18]) for split in ("search", "held-out"))
        site, plain = Site("resid_pre", {entry}), streams(case.model, held.plain)[{entry}]
        found = (streams(case.model, search.prefixed) - streams(case.model, search.plain))[{entry}]
        first = principal(Direction(found, site, case.model.id), 1).vectors
        push = streams(case.model, held.prefixed)[{entry}] - plain
        put = Replace(site, plain + (push @ first.T) @ first, at=-1)
        swept = sweep(case.model, held.plain, axes={}, build=lambda: put, measure=held.gap.named("gap"))
        swept["gap"].values - objective_of(case.model, held.plain, held.gap)
        """,
    ),
}
