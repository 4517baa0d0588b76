"""How the numbers of "As features" are made again."""

SOURCES: dict[str, tuple[str, str, str]] = {
    "features": (
        "how much more active the features are with the prefix, those of the table",
        "study.results['features']['features']['difference'].values",
        """
        from mechsteer.features import rank_by_contrast
        from mechsteer.study.autoencoder import autoencoder

        sae, _ = autoencoder(case)
        search = case.rows("search")
        ranked = rank_by_contrast(
            case.model, sae, case.reference[search], case.with_reference(case.plain)[search], at="completion",
            n=sae.n_features, seed=case.settings.seed,
        )
        ranked["difference"].sel(feature=study.results["features"]["features"]["feature"].values).values
        """,
    ),
    "mediation": (
        "shares of the effect that feature {feature} is needed and enough for",
        "[study.findings['features'].summary['mediation'][name]['feature {feature}'] for name in ('needed', 'enough')]",
        """
        from mechsteer.features import mediation
        from mechsteer.study.autoencoder import autoencoder
        from mechsteer.study.measures import CE, Estimate

        sae, _ = autoencoder(case)
        held = case.rows("held-out")
        plain = case.with_reference(case.plain)[held]
        found = mediation(case.model, sae, [{feature}], case.reference[held], plain, measure=-CE).data.isel(part=0)
        ends = [[float(found[f"{name}{end}"]) for end in ("", "_low", "_high")] for name in ("needed", "enough")]
        [Estimate(*each, n=len(held)).as_json for each in ends]
        """,
    ),
    "tokens": (
        "feature {feature} at each token of the first held-out request and its answer",
        "study.results['features']['tokens']['activation'].values",
        """
        from mechsteer.features.states import token_features
        from mechsteer.study.autoencoder import autoencoder

        sae, _ = autoencoder(case)
        one = case.reference[case.rows("held-out")[:1]].padded("right")
        token_features(case.model, sae, one, [{feature}])[0, :, 0][one.mask[0]].numpy()
        """,
    ),
    "curve": (
        "completions of held-out requests with the feature clamped",
        """
        held = [row for row, request in enumerate(study.settings.requests) if request.split == "held-out"]
        study.results["features"]["curve"]["completion"].sel(push="clamped, times {times}").values[held]
        """,
        """
        from mechsteer.interventions import SetFeature
        from mechsteer.study.autoencoder import autoencoder

        sae, _ = autoencoder(case)
        prompts, level = case.plain[case.rows("held-out")], study.findings["features"].summary["level"]
        clamp = SetFeature(sae, {feature}, {times} * level)
        case.model.generate(prompts, max_new_tokens=case.max_new_tokens, interventions=[clamp]).completions
        """,
    ),
    "prefixes": (
        "the feature before the answer under the prefix, held-out requests",
        "study.results['features']['prefixes']['activation'].sel(push='with the prefix').values",
        """
        from mechsteer.objectives import FeatureActivation
        from mechsteer.patching.activation import objective_of
        from mechsteer.study.autoencoder import autoencoder

        sae, _ = autoencoder(case)
        prompts = case.prefixed[case.rows("held-out")]
        objective_of(case.model, prompts, FeatureActivation(sae, {feature}))
        """,
    ),
}
