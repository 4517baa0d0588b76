"""`SetFeature` and `FeatureActivation` against encoding, editing and decoding by hand, and the laws they keep."""

from typing import Any

import naive
import pytest
import torch
from autoencoders import autoencoder, module
from plain import assert_close, with_spans

import mechsteer as ms
from mechsteer.backends.autoencoder import SparseAutoencoder
from mechsteer.errors import MechsteerError

NORMS = ("none", "layer_norm", "constant_norm_rescale")


def by_hand(sae: SparseAutoencoder, changes: dict[int, tuple[str, float]]) -> Any:
    """A plain hook: the decoder of the changed features, and what the decoder of the unchanged ones leaves over."""

    def hook(x: torch.Tensor, hook: Any = None) -> torch.Tensor:
        flat = x.flatten(2)
        features = sae.module.encode(flat)
        error = flat - sae.module.decode(features)
        features = sae.module.encode(flat).clone()
        for feature, (mode, value) in changes.items():
            old = features[..., feature]
            features[..., feature] = {"clamp": torch.full_like(old, value), "add": old + value, "scale": old * value}[
                mode
            ]
        return (sae.module.decode(features) + error).reshape(x.shape)

    return hook


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("subtract", [True, False], ids=["b_dec subtracted", "b_dec not subtracted"])
def test_equals_decoding_with_the_error_added(zoo_models: Any, kind: str, norm: str, subtract: bool) -> None:
    model, prompts = zoo_models("llama"), with_spans().padded("right")
    sae = autoencoder(kind, normalize_activations=norm, apply_b_dec_to_input=subtract)
    tokens = prompts.tokens
    for mode, value in (("clamp", 2.5), ("add", -1.5), ("scale", 3.0)):
        changes = {feature: (mode, value) for feature in (3, 17)}
        hooks = [(sae.site.hook_name, by_hand(sae, changes))]
        expected = model.hooked.run_with_hooks(tokens, fwd_hooks=hooks)[prompts.mask]
        edit = ms.SetFeature(sae, [3, 17], value, mode=mode)
        assert_close(model.run(prompts, [edit]).rows, expected)
        plain = model.hooked.run_with_hooks(tokens, fwd_hooks=edit.fwd_hooks(model, prompts))[prompts.mask]
        assert_close(plain, expected)
    assert not torch.allclose(expected, model.run(prompts).rows, atol=1e-2)


def test_heads_are_put_end_to_end(zoo_models: Any) -> None:
    model, prompts = zoo_models("llama"), with_spans().padded("right")
    sae = autoencoder("topk", d_in=64, hook="blocks.2.attn.hook_z", reshape_activations="hook_z")
    assert sae.site == ms.Site("z", 2)
    hooks = [(sae.site.hook_name, by_hand(sae, {5: ("clamp", 3.0)}))]
    expected = model.hooked.run_with_hooks(prompts.tokens, fwd_hooks=hooks)[prompts.mask]
    assert_close(model.run(prompts, [ms.SetFeature(sae, 5, 3.0)]).rows, expected)


def test_without_a_change_nothing_changes(zoo_models: Any) -> None:
    model, prompts = zoo_models("gemma2"), with_spans().padded("right")
    sae = autoencoder("topk")
    x = model.run(prompts, record=[sae.site]).activations[sae.site]
    own = sae.encode(x)
    some = own[prompts.mask].mean(0).topk(3).indices.tolist()
    assert (own[prompts.mask][:, some] > 0).all(1).any()
    before = model.run(prompts).rows
    for edit in (
        ms.SetFeature(sae, some[0], 0.0, mode="add"),
        ms.SetFeature(sae, some[:2], 1.0, mode="scale"),
        ms.SetFeature(sae, some, own[..., some]),
    ):
        # What was recorded and what is encoded again differ by rounding, because batches do.
        tolerance = 1e-5 if edit.mode == "clamp" else 0.0
        assert (model.run(prompts, [edit]).rows - before).abs().max() <= tolerance


def test_clamping_twice_is_clamping_once_where_the_change_is_read_back(zoo_models: Any) -> None:
    # Decoder rows that the encoder reads exactly: f is then a coordinate, and the clamp a projection.
    model, prompts = zoo_models("llama"), with_spans()
    raw = module("standard", d_sae=32, apply_b_dec_to_input=False)
    raw.W_enc.data, raw.W_dec.data = torch.eye(32), torch.eye(32)
    sae = SparseAutoencoder.of(raw, name="eye")
    edit = ms.SetFeature(sae, 4, 6.0)
    site = sae.site
    once, twice = (model.run(prompts, [edit] * n, record=[site]).activations[site] for n in (1, 2))
    # Where the pre-activation is negative the error keeps it: the value is added to it.
    pre = model.run(prompts, record=[site]).activations[site][..., 4] + raw.b_enc[4]
    active = prompts.mask & (pre > 0)
    assert 0 < int(active.sum()) < int(prompts.mask.sum())
    assert_close(twice[active], once[active], 1e-6)
    assert_close(once[..., 4][prompts.mask] + raw.b_enc[4], 6.0 + pre.clamp(max=0)[prompts.mask])


def test_adding_is_adding_the_features_direction(zoo_models: Any) -> None:
    from mechsteer.features.directions import feature_direction

    model, prompts = zoo_models("gpt2"), with_spans()
    sae = autoencoder("topk")
    direction = feature_direction(sae, 11, model=model)
    for at in (None, "user", -1, (0, 2)):
        one = model.run(prompts, [ms.SetFeature(sae, 11, 4.0, mode="add", at=at)]).logits
        assert_close(one, model.run(prompts, [ms.Add(direction, 4.0, at=at)]).logits, 1e-5)


def test_one_number_for_each_prompt_and_one_for_each_token(zoo_models: Any) -> None:
    model, prompts = zoo_models("llama"), with_spans().padded("right")
    sae = autoencoder("topk")
    each = torch.tensor([1.0, -2.0, 5.0])
    together = model.run(prompts, [ms.SetFeature(sae, 3, each)])
    for row, value in enumerate(each.tolist()):
        alone = model.run(prompts[row], [ms.SetFeature(sae, 3, value)])
        assert_close(together.logits[row][prompts.mask[row]], alone.rows)
    pair = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    both = model.run(prompts, [ms.SetFeature(sae, [3, 9], pair)]).rows
    rows = [model.run(prompts[row], [ms.SetFeature(sae, [3, 9], pair[row].tolist())]).rows for row in range(3)]
    assert_close(both, torch.cat(rows))
    # Token by token: position p of prompt b gets b + p / 100.
    table = torch.arange(3)[:, None] + torch.arange(prompts.tokens.shape[1])[None] / 100
    site = sae.site
    got = model.run(prompts, [ms.SetFeature(sae, 3, table[..., None], mode="add")], record=[site]).activations[site]
    before = model.run(prompts, record=[site]).activations[site]
    expected = torch.where(prompts.mask[..., None], before + table[..., None] * sae.decoder[3], 0)
    assert_close(got, expected)


@pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
@pytest.mark.parametrize("many", [False, True])
def test_sweeps_mix_features_modes_numbers_of_features_and_autoencoders(
    zoo_models: Any, backend: str, many: bool
) -> None:
    model, prompts = zoo_models("gemma2", backend), with_spans()
    one, other = autoencoder("topk"), autoencoder("jumprelu", seed=5, normalize_activations="layer_norm")
    table = torch.rand(3, prompts.tokens.shape[1], 1, generator=torch.Generator().manual_seed(2))
    edits = [
        ms.SetFeature(one, 3, 2.0),
        ms.SetFeature(one, [5, 9, 30], [1.0, 2.0, 3.0], at="user"),
        ms.SetFeature(other, 3, 4.0, mode="add"),
        ms.SetFeature(one, 30, torch.tensor([1.0, 2.0, 3.0]), mode="scale", at=-1),
        ms.SetFeature(other, [1, 2], 0.5, mode="scale"),
        ms.SetFeature(one, 6, table),
        ms.SetFeature(one, list(range(40)), 0.1 * torch.arange(40.0)),
    ]
    edits = edits if many else edits[:-1]
    measures = {
        "gap": ms.LogitGap(5, 9),
        "feature": ms.FeatureActivation(one, 3),
        "pre": ms.FeatureActivation(one, 30, pre=True),
    }
    axes = {"cell": range(len(edits))}
    build = lambda cell: edits[cell]  # noqa: E731
    result = ms.sweep(model, prompts, axes=axes, build=build, measure=measures)
    naive.assert_same(result, naive.sweep(model, prompts, axes, build, measures))
    assert result.provenance["options"]["engine"] == "packed"


def test_generation_goes_on_under_it(zoo_models: Any) -> None:
    model = zoo_models("llama")
    prompts = ms.Prompts.from_ids([[5, 6, 7, 8], [9, 10, 11]])
    sae = autoencoder("topk")
    edit = ms.SetFeature(sae, 3, 8.0)
    generated = model.generate(prompts, interventions=[edit], max_new_tokens=5, stop_at_eos=False)
    for row in range(2):
        ids = prompts.tokens[row][prompts.mask[row]].tolist()
        for _ in range(5):
            hooks = [(sae.site.hook_name, by_hand(sae, {3: ("clamp", 8.0)}))]
            logits = model.hooked.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)[0, -1]
            ids.append(int(logits.argmax()))
        assert generated.tokens[row][generated.mask[row]].tolist() == ids
    assert generated.tokens.tolist() != model.generate(prompts, max_new_tokens=5, stop_at_eos=False).tokens.tolist()


def test_says_where_it_acts_first() -> None:
    edit = ms.SetFeature(autoencoder("topk", hook="blocks.2.hook_mlp_out"), 3, 1.0)
    assert edit.layer == 2
    assert edit.sites(3) == (ms.Site("mlp_out", 2),)


def test_gradients_reach_values_and_earlier_layers(zoo_models: Any) -> None:
    model, prompts = zoo_models("llama"), with_spans()
    sae = autoencoder("standard")
    value = torch.tensor(2.0, requires_grad=True)
    run = model.run(prompts, [ms.SetFeature(sae, 3, value)], grad=True)
    (slope,) = torch.autograd.grad(ms.LogitGap(5, 9)(run).sum(), [value])
    with torch.no_grad():
        ends = [
            ms.LogitGap(5, 9)(model.run(prompts, [ms.SetFeature(sae, 3, 2.0 + step)])).sum() for step in (0.01, -0.01)
        ]
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 0.02, rel=0.02)


def test_feature_activation_is_the_mean_over_tokens(zoo_models: Any) -> None:
    model, prompts = zoo_models("llama"), with_spans()
    for kind in ("topk", "standard", "jumprelu"):
        sae = autoencoder(kind)
        run = model.run(prompts, record=[sae.site])
        x = run.activations[sae.site]
        feature = int(sae.encode(x)[prompts.mask].sum(0).argmax())
        for at, mask in (
            ("user", prompts.span("user")),
            ("decision", prompts.at(prompts.decision)),
            (0, prompts.at(0)),
        ):
            for row in range(3):
                each = sae.module.encode(x[row][mask[row]])[:, feature].mean()
                assert_close(ms.FeatureActivation(sae, feature, at=at)(run)[row], each)
        pre = ms.FeatureActivation(sae, feature, at="all", pre=True)(run)
        shown = ms.FeatureActivation(sae, feature, at="all")(run)
        with sae_hooks(sae) as seen:
            sae.module.encode(x)
        scale = sae.module.W_dec[feature].norm() if kind == "topk" else 1.0
        expected = seen[0][..., feature] * scale
        for row in range(3):
            assert_close(pre[row], expected[row][prompts.mask[row]].mean())
        assert (shown >= 0).all()


class sae_hooks:
    """Collects SAELens's own pre-activations."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.point, self.seen = sae.module.hook_sae_acts_pre, []

    def __enter__(self) -> list[torch.Tensor]:
        self.point.add_hook(lambda tensor, hook: self.seen.append(tensor))
        return self.seen

    def __exit__(self, *error: object) -> None:
        self.point.remove_hooks()


def test_a_silent_feature_has_a_gradient_through_its_pre_activation_only(zoo_models: Any) -> None:
    model, prompts = zoo_models("llama"), with_spans()
    sae = autoencoder("standard")
    x = model.run(prompts, record=[sae.site]).activations[sae.site]
    last = sae.encode(x)[prompts.at(prompts.decision)]
    silent = int(last.amax(0).argmin())
    assert float(last[:, silent].max()) == 0
    v = torch.zeros(x.shape[-1], requires_grad=True)
    for pre, moves in ((True, True), (False, False)):
        run = model.run(prompts, [ms.Add(v, 1.0, site=sae.site)], record=[sae.site], grad=True)
        score = ms.FeatureActivation(sae, silent, pre=pre)(run).sum()
        (slope,) = torch.autograd.grad(score, [v])
        assert bool(slope.abs().max() > 0) == moves
        if pre:
            assert_close(slope, len(prompts) * sae.encoder[:, silent])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda sae: ms.SetFeature(sae, 48, 1.0),
            "SetFeature got feature 48, but the autoencoder tiny has features 0 to 47. Choose one of these.",
        ),
        (
            lambda sae: ms.SetFeature(sae, [1, 1], 1.0),
            "SetFeature got features [1, 1]. Pass at least one, and each only once.",
        ),
        (lambda sae: ms.SetFeature(sae, [], 1.0), "SetFeature got features []. Pass at least one, and each only once."),
        (
            lambda sae: ms.SetFeature(sae, 1, 1.0, mode="set"),
            "SetFeature got mode='set'. Pass one of 'clamp', 'add', 'scale'.",
        ),
        (
            lambda sae: ms.SetFeature(sae, 1, float("nan")),
            "SetFeature got values with NaN or infinity. Pass finite numbers.",
        ),
        (
            lambda sae: ms.SetFeature(sae, [1, 2], [1.0, 2.0, 3.0]),
            "SetFeature got values of shape [3] for 2 features. Pass one number, [feature], [batch, feature] or "
            "[batch, pos, feature] (for one feature also [batch]).",
        ),
        (
            lambda sae: ms.FeatureActivation(sae, -1),
            "FeatureActivation got feature -1, but the autoencoder tiny has features 0 to 47. Choose one of these.",
        ),
        (
            lambda sae: ms.FeatureActivation(sae, 1, at="there"),
            "FeatureActivation(at=) got 'there'. Pass one of 'decision', 'last', 'all', 'scaffold', 'prefix', 'user',"
            " 'completion'.",
        ),
    ],
)
def test_errors_say_what_to_do(build: Any, message: str) -> None:
    with pytest.raises(MechsteerError) as error:
        build(autoencoder("topk"))
    assert str(error.value) == message


def test_what_does_not_fit_the_run_is_refused(zoo_models: Any) -> None:
    model, prompts = zoo_models("llama"), with_spans()
    sae = autoencoder("topk")
    with pytest.raises(MechsteerError, match=r"SetFeature has values for 2 prompts, and 3 are run. Pass one number"):
        model.run(prompts, [ms.SetFeature(sae, 1, torch.ones(2))])
    with pytest.raises(MechsteerError, match=r"SetFeature has values for 4 positions, and touches 13. Pass values for"):
        model.run(prompts, [ms.SetFeature(sae, 1, torch.ones(3, 4, 1))])
    with pytest.raises(
        MechsteerError, match=r"SetFeature has values for 13 positions, and touches 14. Pass values for"
    ):
        model.generate(
            prompts.without_completions(), max_new_tokens=4, interventions=[ms.SetFeature(sae, 1, torch.ones(3, 13, 1))]
        )
    with pytest.raises(
        MechsteerError, match=r"takes activations of width 16 apart, but Site\('resid_post', 1\) of llama has 32"
    ):
        model.run(prompts, [ms.SetFeature(autoencoder("topk", d_in=16), 1, 1.0)])
    with pytest.raises(MechsteerError, match="FeatureActivation reads tiny, which takes width 16, but"):
        ms.FeatureActivation(autoencoder("topk", d_in=16), 1)(model.run(prompts, record=[sae.site]))
    with pytest.raises(
        MechsteerError, match=r"tiny \(gated\) has no encoder bias, so its features have no single pre-act"
    ):
        ms.FeatureActivation(autoencoder("gated"), 1, pre=True)
