"""How the numbers of "How strong" are made again."""

SOURCES: dict[str, tuple[str, str, str]] = {
    "cards": (
        "the strength that is chosen",
        "study.findings['strength'].summary['alpha']",
        """
        from mechsteer.study.pushes import chosen_vector

        chosen_vector(case).alpha
        """,
    ),
    "chosen": (
        "the score of every strength that was measured, and the vector's length",
        "study.results['strength']['chosen']['score'].sel(direction='{picked}').values",
        """
        from mechsteer.study.pushes import chosen_vector

        chosen_vector(case).chosen.result["score"].sel(direction="{picked}").values
        """,
    ),
    "target": (
        "cross entropy of the reference completions at each strength, held out",
        "study.results['strength']['target']['reference'].transpose('alpha', 'prompt').values",
        """
        from mechsteer.interventions import Add
        from mechsteer.study.measures import CE
        from mechsteer.study.pushes import mean_vectors
        from mechsteer.sweeps import sweep

        vector, alphas = mean_vectors(case)["{picked}"], study.findings["strength"].summary["alphas"]
        prompts = case.with_reference(case.plain)[case.rows("held-out")]
        found = sweep(
            case.model, prompts, axes={"alpha": alphas}, build=lambda alpha: Add(vector, alpha),
            measure=CE.named("ce"),
        )
        found["ce"].transpose("alpha", "prompt").values
        """,
    ),
    "side": (
        "cross entropy of what the model says by itself at each strength, held out",
        "study.results['strength']['side']['ce'].transpose('alpha', 'prompt').values",
        """
        from mechsteer.interventions import Add
        from mechsteer.study.measures import CE
        from mechsteer.study.pushes import mean_vectors
        from mechsteer.sweeps import sweep

        vector, alphas = mean_vectors(case)["{picked}"], study.findings["strength"].summary["alphas"]
        found = sweep(
            case.model, case.unsteered[case.rows("held-out")], axes={"alpha": alphas},
            build=lambda alpha: Add(vector, alpha), measure=CE.named("ce"),
        )
        found["ce"].transpose("alpha", "prompt").values
        """,
    ),
    "completions": (
        "completions of held-out requests at the chosen strength",
        "study.results['strength']['held_out']['completion'].sel(condition='times {times}').values",
        """
        from mechsteer.interventions import Add
        from mechsteer.study.pushes import mean_vectors

        push = Add(mean_vectors(case)["{picked}"], study.findings["strength"].summary["alpha"])
        prompts = case.plain[case.rows("held-out")]
        case.model.generate(prompts, max_new_tokens=case.max_new_tokens, interventions=[push]).completions
        """,
    ),
}
