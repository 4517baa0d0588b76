"""How the numbers of "The behaviour" are made again."""

SOURCES: dict[str, tuple[str, str, str]] = {
    "cards": (
        "cross entropy with the prefix, held-out requests pooled",
        "study.findings['behaviour'].summary['ce']['held-out']['with the prefix']",
        """
        from mechsteer.study.measures import cross_entropy, ratio, weights

        prompts = case.reference[case.rows("held-out")]
        weight = weights(prompts)
        ratio(cross_entropy(case.model, prompts) * weight, weight, seed=case.settings.seed).as_json
        """,
    ),
    "ce": (
        "cross entropy of each request's completion, with the prefix and without it",
        "study.results['behaviour']['behaviour']['ce'].sel(condition=['with the prefix', 'without it']).values",
        """
        from mechsteer.study.measures import cross_entropy

        [cross_entropy(case.model, prompts) for prompts in (case.reference, case.with_reference(case.plain))]
        """,
    ),
    "shows": (
        "share of completions with the prefix that show the behaviour, held out",
        "study.findings['behaviour'].summary['shows']['held-out']['with the prefix']",
        """
        from mechsteer.study.measures import share

        share(case.judge.many(case.reference[case.rows("held-out")].completions)).as_json
        """,
    ),
    "completions": (
        "completions with the prefix",
        "study.results['behaviour']['behaviour']['completion'].sel(condition='with the prefix').values",
        "case.model.generate(case.prefixed, max_new_tokens=case.max_new_tokens).completions",
    ),
    "table": (
        "the gap on held-out requests, with its interval",
        "study.findings['behaviour'].summary['gap']['held-out']",
        """
        from mechsteer.study.measures import cross_entropy, ratio, weights

        held = case.rows("held-out")
        with_it, without = case.reference[held], case.with_reference(case.plain)[held]
        gap, weight = cross_entropy(case.model, without) - cross_entropy(case.model, with_it), weights(with_it)
        ratio(gap * weight, weight, seed=case.settings.seed).as_json
        """,
    ),
}
