"""How the numbers of "As other words" are made again."""

SOURCES: dict[str, tuple[str, str, str]] = {
    "cards": (
        "cross entropy of the reference completions under the other words, held-out requests pooled",
        "study.findings['words'].summary['cross_entropy']['other words']",
        """
        from mechsteer.study.measures import cross_entropy, ratio, weights
        from mechsteer.vocabulary import insert

        ids = study.results["words"]["stages"].provenance["options"]["ids"]["other words"]
        prompts = case.with_reference(insert(case.slotted(len(ids)), ids, where="prefix"))[case.rows("held-out")]
        weight = weights(prompts)
        ratio(cross_entropy(case.model, prompts) * weight, weight, seed=case.settings.seed).as_json
        """,
    ),
    "search": (
        "the tokens that the search finds",
        "study.results['words']['stages'].provenance['options']['ids']['other words']",
        """
        from mechsteer.study.pushes import matched

        list(matched(case).ids)
        """,
    ),
    "table": (
        "cross entropy of the reference completions under the prefix and the other words, each held-out request",
        "study.results['words']['held_out']['ce'].sel(prefix=['reference', 'other words']).values",
        """
        from mechsteer.study.measures import cross_entropy
        from mechsteer.vocabulary import insert

        held = case.rows("held-out")
        ids = study.results["words"]["stages"].provenance["options"]["ids"]["other words"]
        words = case.with_reference(insert(case.slotted(len(ids)), ids, where="prefix"))
        [cross_entropy(case.model, prompts[held]) for prompts in (case.reference, words)]
        """,
    ),
    "completions": (
        "completions of held-out requests under the other words",
        "study.results['words']['held_out']['completion'].sel(prefix='other words').values",
        """
        from mechsteer.vocabulary import insert

        ids = study.results["words"]["stages"].provenance["options"]["ids"]["other words"]
        prompts = insert(case.slotted(len(ids)), ids, where="prefix")[case.rows("held-out")]
        case.model.generate(prompts, max_new_tokens=case.max_new_tokens).completions
        """,
    ),
    "tokens": (
        "rise of the held-out cross entropy where each token is left out",
        "study.results['words']['tokens']['rise'].values",
        """
        from mechsteer.prefix.candidates import CandidateLosses
        from mechsteer.study.measures import CE

        held = case.rows("held-out")
        ids = study.results["words"]["stages"].provenance["options"]["ids"]["other words"]
        losses = CandidateLosses(case.model, case.with_reference(case.slotted(len(ids))[held], rows=held), CE)
        left = [(*ids[:place], *ids[place + 1 :]) for place in range(len(ids))]
        losses.of(left) - losses.of([tuple(ids)])
        """,
    ),
    "layers": (
        "cosine, behind each block, of the states without a prefix with those with it",
        "study.results['words']['layers']['cosine'].sel(stage='none').values",
        """
        from mechsteer.study.chapters.words import layer_words

        layer_words(case)["cosine"].sel(stage="none").values
        """,
    ),
    "transfer": (
        "cross entropy under the prefix on {model}, of what it says with it, held-out requests",
        "study.results['words']['transfer']['ce'].sel(prefix='reference').values",
        """
        from mechsteer.model import load_model
        from mechsteer.study.case import Case
        from mechsteer.study.measures import cross_entropy

        there = Case.of(case.settings, model=load_model("{model}", device=str(case.model.device)))
        cross_entropy(there.model, there.reference[there.rows("held-out")])
        """,
    ),
}
