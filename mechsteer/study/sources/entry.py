"""How the numbers of "Where it enters" are made again."""

SOURCES: dict[str, tuple[str, str, str]] = {
    "sites": (
        "percent of the effect that each layer and place brings back, for each request",
        "study.results['entry']['sites']['recovered'].values",
        """
        from mechsteer.patching import activation_patching, recovered
        from mechsteer.study.chapters.entry import runs
        from mechsteer.study.measures import CE

        clean, corrupt = runs(case)
        sites = ("resid_pre", "attn_out", "mlp_out")
        patched = activation_patching(case.model, clean, corrupt, measure=-CE, sites=sites, over=("layer", "pos"))
        recovered(patched)["recovered"].values
        """,
    ),
    "heads": (
        "percent of the effect that each head brings back, for each request",
        "study.results['entry']['heads']['recovered'].sel(mode='denoising').values",
        """
        from mechsteer.patching import activation_patching, recovered
        from mechsteer.study.chapters.entry import runs
        from mechsteer.study.measures import CE

        clean, corrupt = runs(case)
        patched = activation_patching(case.model, clean, corrupt, measure=-CE, sites="z", over=("layer", "head"))
        recovered(patched)["recovered"].values
        """,
    ),
    "attention": (
        "attention pattern of the strongest head on the first request",
        "study.results['entry']['pattern']['pattern'].values[0]",
        """
        from mechsteer.study.chapters.entry import runs

        clean, _ = runs(case)
        site, n = "blocks.{layer}.attn.hook_pattern", int(clean.mask[0].sum())
        run = case.model.run(clean[:1], record=site, logits="none")
        run.activations[site][0, {head}, :n, :n].numpy()
        """,
    ),
    "moved": (
        "completions of held-out requests with the contrast, the strongest place moved",
        "study.results['entry']['moved']['completion'].sel(condition='moved').values",
        """
        from mechsteer.interventions import Replace
        from mechsteer.patching import places
        from mechsteer.study.chapters.entry import contrast

        best, rows = study.findings["entry"].summary["best"], case.rows("held-out")[:12]
        clean, corrupt = (prompts[rows].padded("right") for prompts in (case.prefixed, contrast(case)))
        site = f"blocks.{best['layer']}.hook_resid_pre"
        stream = case.model.run(clean, record=site, logits="none").activations
        moved = [Replace(site, stream, at=at) for at in places(clean) if str(at) == best["pos"]]
        case.model.generate(corrupt, interventions=moved, max_new_tokens=case.max_new_tokens).completions
        """,
    ),
    "attribution": (
        "percent of the effect that the gradient foretells for each layer and place, mean over requests",
        """
        found = study.results["entry"]["attribution"]
        found["gradient"].values[found["map"].values == "layers and tokens"]
        """,
        """
        from mechsteer.patching import attribution_patching, recovered
        from mechsteer.study.chapters.entry import runs
        from mechsteer.study.measures import CE

        clean, corrupt = runs(case)
        sites = ("resid_pre", "attn_out", "mlp_out")
        found = attribution_patching(case.model, clean, corrupt, measure=-CE, sites=sites, over=("layer", "pos"))
        recovered(found)["recovered"].mean("prompt").values.ravel()
        """,
    ),
    "fillers": (
        "cross entropy of what the model says without a prefix, behind the filler that was chosen",
        "study.findings['entry'].summary['contrast']['ce_contrast']",
        """
        from mechsteer.study.chapters.entry import contrast
        from mechsteer.study.measures import cross_entropy

        rows, own = case.rows("search")[:12], case.unsteered
        said = [tokens[keep].tolist() for tokens, keep in zip(own.tokens, own.span("completion"))]
        prompts = contrast(case)[rows].with_completions([said[row] for row in rows])
        float(cross_entropy(case.model, prompts).mean())
        """,
    ),
}
