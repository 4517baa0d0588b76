"""Sites: every way of writing one means the same hook point as TransformerLens's own names."""

from typing import Any

import jaxtyping
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformer_lens.utils import get_act_name

from mechsteer.errors import MechsteerError
from mechsteer.site import KINDS, Site

IN_BLOCKS = [kind for kind, entry in KINDS.items() if "{layer}" in entry.hook]
OUTSIDE = [kind for kind in KINDS if kind not in IN_BLOCKS]
WITH_HEADS = [kind for kind, entry in KINDS.items() if "head" in entry.axes]
# What `get_act_name` takes for kinds that it calls something else.
ACT_NAMES = {
    "mlp_pre": ("pre",),
    "mlp_pre_linear": ("pre_linear",),
    "mlp_post": ("post",),
    "ln1_scale": ("scale", "ln1"),
    "ln1_normalized": ("normalized", "ln1"),
    "ln2_scale": ("scale", "ln2"),
    "ln2_normalized": ("normalized", "ln2"),
    "ln_final_scale": ("scale",),
    "ln_final_normalized": ("normalized",),
}

# Where a site's kind takes no layer or head, these are dropped.
parts = st.tuples(
    st.sampled_from(list(KINDS)),
    st.integers(0, 20),
    st.none() | st.integers(0, 20),
    st.none() | st.integers(-2000, 2000),
)


def build(kind: str, layer: int, head: int | None, pos: int | None) -> Site:
    return Site(kind, layer if kind in IN_BLOCKS else None, head=head if kind in WITH_HEADS else None, pos=pos)


@given(parts)
def test_what_is_printed_is_read_back(drawn: tuple[str, int, int | None, int | None]) -> None:
    site = build(*drawn)
    assert Site.of(str(site)) == site
    assert eval(repr(site)) == site
    assert Site.of(site) is site
    assert str(site).startswith(site.hook_name)
    assert Site.of(site.hook_name) == site.point == site.point.point
    assert site.point.at(head=site.head, pos=site.pos) == site


@given(parts, parts)
def test_equal_sites_are_one_key_and_unlike_ones_are_two(first: Any, second: Any) -> None:
    one, other = build(*first), build(*second)
    twin = Site.of(str(one))
    assert hash(twin) == hash(one) and {one: 1}[twin] == 1
    assert (one == other) == (str(one) == str(other)) == (repr(one) == repr(other))


@pytest.mark.parametrize("kind", KINDS)
@given(layer=st.integers(0, 99))
def test_hook_names_are_those_of_transformer_lens(kind: str, layer: int) -> None:
    name, *layer_type = ACT_NAMES.get(kind, (kind,))
    inside = kind in IN_BLOCKS
    expected = get_act_name(name, layer if inside else None, *layer_type)
    site = Site(kind, layer if inside else None)
    assert site.hook_name == expected
    assert Site.of(expected) == site
    assert Site.of((kind, layer)) == site if inside else Site.of(kind) == site


def test_order_is_that_of_a_forward_pass(zoo_models: Any, architecture: str) -> None:
    met: dict[Site, None] = {}
    model = zoo_models(architecture)
    names = {Site(kind, layer).hook_name for kind in IN_BLOCKS for layer in range(model.n_layers)}
    names |= {Site(kind).hook_name for kind in OUTSIDE}
    names &= set(model.hooked.hook_dict)
    model.hooked.run_with_hooks(
        "The cat", fwd_hooks=[(name, lambda tensor, hook: met.update({Site.of(hook.name): None})) for name in names]
    )
    assert len(met) == len(names)
    # In a group the order is that of the implementation: side by side in the model.
    group = {"k": "q", "v": "q", "rot_k": "rot_q"}

    def place(site: Site) -> tuple[int, int]:
        return Site(group.get(site.kind, site.kind), site.layer).order

    assert sorted(met, key=place) == list(met)


@given(st.sampled_from(IN_BLOCKS), st.integers(0, 50), st.integers(0, 50))
def test_axes_go_with_the_kind_and_order_goes_by_layer(kind: str, one: int, other: int) -> None:
    assert Site(kind, one).axes == Site(kind, other).axes == KINDS[kind].axes
    assert (Site(kind, one).order < Site(kind, other).order) == (one < other)
    assert Site("embed").order < Site(kind, one).order < Site("ln_final_scale").order


def test_sites_are_immutable() -> None:
    with pytest.raises(AttributeError):
        Site("embed").kind = "q"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Site("resid_pst", 3), r"kind 'resid_pst' does not exist\. Nearest: resid_post, .*hook names\.$"),
        (lambda: Site("%", 3), r"kind '%' does not exist\. Known: embed, pos_embed, resid_pre, .*"),
        (
            lambda: Site.of("blocks.3.hook_resid_pst"),
            r"'blocks\.3\.hook_resid_pst'.* Nearest: blocks\.3\.hook_resid_post",
        ),
        (lambda: Site.of("blocks.12.attn.hook_zz"), r"Nearest: .*blocks\.12\.attn\.hook_z[,.]"),
        (lambda: Site.of("hook_embd"), r"'hook_embd' is no site that mechsteer knows\. Nearest: hook_embed"),
        (
            lambda: Site.of("resid_pre"),
            r"Site\('resid_pre', None\) needs a layer counted from 0, such as Site\('resid_pre'",
        ),
        (lambda: Site("resid_pre"), r"needs a layer counted from 0"),
        (lambda: Site("resid_pre", -1), r"Site\('resid_pre', -1\) needs a layer counted from 0"),
        (lambda: Site.of(("z", -3)), r"needs a layer counted from 0"),
        (lambda: Site.of("blocks.-1.hook_resid_pre"), r"no site that mechsteer knows"),
        (lambda: Site("embed", 0), r"Site\('embed'\) lies outside the blocks and takes no layer, got 0\."),
        (
            lambda: Site("resid_pre", 3, head=1),
            r"head=1\): heads count from 0 and exist at q, k, v, .*z\. Leave head out",
        ),
        (lambda: Site("z", 3, head=-1), r"Site\('z', head=-1\): heads count from 0"),
        (lambda: Site.of("blocks.3.hook_resid_pre[head=1]"), r"heads count from 0 and exist at"),
        (
            lambda: Site.of("blocks.3.attn.hook_z[head=x]"),
            r"cannot be read: after the hook name comes nothing or \[head=2\]",
        ),
        (lambda: Site.of("blocks.3.attn.hook_z[heads=1]"), r"cannot be read"),
        (lambda: Site.of("blocks.3.attn.hook_z[layer=1]"), r"cannot be read"),
        (lambda: Site.of("blocks.3.attn.hook_z[2]"), r"cannot be read"),
        (lambda: Site.of("blocks.3.attn.hook_z[]"), r"cannot be read"),
        (lambda: Site.of("blocks.3.attn.hook_z[head=1]x"), r"no site that mechsteer knows"),
        (lambda: Site.of(""), r"'' is no site that mechsteer knows"),
    ],
)
def test_errors_say_what_is_wrong(make: Any, message: str) -> None:
    with pytest.raises(MechsteerError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("what", [5, None, ("z",), ("scale", 3, "ln1")])
def test_what_is_no_site_at_all_is_refused(what: Any) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # nobody checks types for the user
    try:
        with pytest.raises(MechsteerError, match=r"is no site\. Pass a Site, a hook name such as"):
            Site.of(what)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
