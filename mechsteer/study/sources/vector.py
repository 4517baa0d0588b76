"""How the numbers of "The same push as a vector" are made again."""

SOURCES: dict[str, tuple[str, str, str]] = {
    "cards": (
        "cross entropy of the reference completions under the push, held-out requests pooled",
        "study.findings['vector'].summary['ce']['pushed']",
        """
        from mechsteer.interventions import Add
        from mechsteer.study.chapters.vector import picked
        from mechsteer.study.measures import CE, ratio, weights
        from mechsteer.sweeps import sweep

        push = Add(picked(study.findings["vector"]), {alpha})  # the source of the maps below makes this vector again
        prompts = case.with_reference(case.plain)[case.rows("held-out")]
        found = sweep(case.model, prompts, axes={}, build=lambda: push, measure=CE.named("ce"))
        weight = weights(prompts)
        ratio(found["ce"].values * weight, weight, seed=case.settings.seed).as_json
        """,
    ),
    "grid": (
        "cross entropy of the reference completions under one kind of vector, each layer and strength",
        "study.results['vector']['grid']['ce'].sel(vector='same completion').values",
        """
        from mechsteer.directions import difference_of_means
        from mechsteer.interventions import Add
        from mechsteer.site import Site
        from mechsteer.study.measures import CE
        from mechsteer.sweeps import sweep

        search = case.rows("search")
        prompts = case.with_reference(case.plain)[search]
        vectors = difference_of_means(
            case.model, case.reference[search], prompts, sites="resid_post", tokens="completion"
        )
        alphas = study.results["vector"]["grid"]["alpha"].values.tolist()
        found = sweep(
            case.model, prompts, axes={"layer": range(case.model.n_layers), "alpha": alphas}, measure=CE.named("ce"),
            build=lambda layer, alpha: Add(vectors[Site("resid_post", layer)], alpha),
        )
        found["ce"].values
        """,
    ),
    "curve": (
        "cross entropy of the reference completions under the picked vector, each strength and request",
        "study.results['vector']['curve']['reference'].values",
        """
        from mechsteer.interventions import Add
        from mechsteer.study.chapters.vector import picked
        from mechsteer.study.measures import CE
        from mechsteer.sweeps import sweep

        direction, prompts = picked(study.findings["vector"]), case.with_reference(case.plain)
        alphas = study.results["vector"]["curve"]["alpha"].values.tolist()
        found = sweep(
            case.model, prompts, axes={"alpha": alphas}, build=lambda alpha: Add(direction, alpha),
            measure=CE.named("ce"),
        )
        found["ce"].values
        """,
    ),
    "completions": (
        "completions of held-out requests under the push",
        "study.results['vector']['held_out']['completion'].sel(condition='pushed').values",
        """
        from mechsteer.interventions import Add
        from mechsteer.study.chapters.vector import picked

        push = Add(picked(study.findings["vector"]), {alpha})
        prompts = case.plain[case.rows("held-out")]
        case.model.generate(prompts, max_new_tokens=case.max_new_tokens, interventions=[push]).completions
        """,
    ),
    "vectors": (
        "length of the vector over the same completion, after each block",
        "study.results['vector']['vectors']['norm'].sel(vector='same completion').values",
        """
        from mechsteer.directions import difference_of_means

        search = case.rows("search")
        prompts = case.with_reference(case.plain)[search]
        vectors = difference_of_means(
            case.model, case.reference[search], prompts, sites="resid_post", tokens="completion"
        )
        [vector.norm for vector in vectors.values()]
        """,
    ),
}
