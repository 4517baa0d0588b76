"""How the numbers of "Which pushes are the same" are made again."""

SOURCES: dict[str, tuple[str, str, str]] = {
    "table": (
        "KL from the prefix of the model without a push, each held-out request",
        "study.results['together']['held_out']['kl'].sel(push='no push').values",
        """
        from mechsteer.objectives import KLFromBaseline
        from mechsteer.objectives.base import predicting
        from mechsteer.patching.activation import objective_of

        held = case.rows("held-out")
        told, plain = case.reference[held], case.with_reference(case.plain)[held]
        run = case.model.run(told, logits=predicting(told, "completion"))
        objective_of(case.model, plain, KLFromBaseline(run, where="completion"))
        """,
    ),
    "pushes": (
        "KL from the prefix of the model with the vector, each held-out request",
        "study.results['together']['held_out']['kl'].sel(push='vector').values",
        """
        from mechsteer.objectives import KLFromBaseline
        from mechsteer.objectives.base import predicting
        from mechsteer.study.pushes import vector  # beside it: features, weight_edit, prefixes
        from mechsteer.sweeps import sweep

        held, push = case.rows("held-out"), vector(case)
        told, plain = case.reference[held], case.with_reference(case.plain)[held]
        run = case.model.run(told, logits=predicting(told, "completion"))
        measure = KLFromBaseline(run, where="completion").named("kl")
        sweep(push.model, plain, axes={}, build=lambda: push.interventions, measure=measure)["kl"].values
        """,
    ),
    "features": (
        "scores of the features that were tried as a push",
        "[each['score'] for each in study.findings['together'].summary['tried']['features']]",
        """
        from mechsteer.study.pushes import features

        [each["score"] for each in features(case).tried]
        """,
    ),
    "weight_edit": (
        "scores of the edits of the weights that were tried",
        "[each['score'] for each in study.findings['together'].summary['tried']['weight edit']]",
        """
        from mechsteer.study.pushes import weight_edit

        [each["score"] for each in weight_edit(case).tried]
        """,
    ),
    "states": (
        "distance after block {layer} of the stream without a push from that with the prefix",
        "study.findings['together'].summary['pushes']['no push']['distance'][{layer}]['value']",
        """
        from mechsteer.objectives.base import predicting

        held, site = case.rows("held-out"), "blocks.{layer}.hook_resid_post"
        streams = []
        for prompts in (case.reference[held], case.with_reference(case.plain)[held]):
            run = case.model.run(prompts, record=site, logits="none")
            streams.append(run.activations[site][predicting(run.prompts, "completion")].double())
        float((streams[1] - streams[0]).norm() / streams[0].norm())
        """,
    ),
    "completions": (
        "completions of held-out requests under the vector",
        "study.results['together']['held_out']['completion'].sel(push='vector').values",
        """
        from mechsteer.study.pushes import vector

        push, prompts = vector(case), case.plain[case.rows("held-out")]
        case.model.generate(prompts, max_new_tokens=case.max_new_tokens, interventions=push.interventions).completions
        """,
    ),
}
