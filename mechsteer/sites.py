"""The sites that one model has: which hook points exist in it, how wide they are, and their names for completion."""

from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

from mechsteer import markup
from mechsteer.backends import Hooked, backend_of, hears
from mechsteer.errors import MechsteerError
from mechsteer.site import KINDS, Site, SiteLike


class Sites:
    """The sites of a model, `model.sites`. Tab completes the kinds that it has.

    model.sites.resid_post[3]                        # Site('resid_post', 3)
    model.sites.resid_post                           # of all layers, as record= takes them
    model.sites(["resid_post", ("z", 4)])            # what names and short forms stand for in this model
    """

    def __init__(self, hooked: Hooked, name: str) -> None:
        """
        Args:
            hooked: the model underneath.
            name: what to call it in errors.
        """
        self._hooked = hooked
        self._name = name
        # Hook points that `check` found: a bridge puts its `hook_dict` together anew for every look, in milliseconds.
        self._found: set[str] = set()
        # Whether attention uses what a hook makes of its scores or pattern, by kind; where that had to be tried.
        self._heard: dict[str, bool] = {}

    @property
    def _cfg(self) -> Any:
        return self._hooked.cfg

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of site that the model has, in the order of a forward pass."""
        points = self._hooked.hook_dict
        return tuple(
            kind for kind, entry in KINDS.items() if entry.hook.format(layer=0) in points and kind not in self._unused
        )

    @property
    def _unused(self) -> set[str]:
        # A bridge has `hook_pos_embed` also where it never runs it.
        return {"pos_embed"} if self._cfg.positional_embedding_type == "rotary" else set()

    def __call__(self, sites: Iterable[SiteLike] | SiteLike) -> list[Site]:
        """Whole hook points, each once; a kind without a layer stands for all layers.

        Raises:
            MechsteerError: one does not exist in this model.
        """
        single = isinstance(sites, str | Site) or (
            isinstance(sites, tuple) and len(sites) == 2 and isinstance(sites[1], SupportsIndex)
        )
        found: dict[Site, None] = {}
        for item in [sites] if single else sites:  # type: ignore[union-attr]
            if isinstance(item, str) and item in KINDS and "{layer}" in KINDS[item].hook:
                found |= dict.fromkeys(Site(item, layer) for layer in range(self._cfg.n_layers))  # type: ignore[arg-type]
            else:
                found[Site.of(item)] = None  # type: ignore[arg-type]
        for site in found:
            self.check(site)
        return list(dict.fromkeys(site.point for site in found))

    def __getattr__(self, kind: str) -> "tuple[Site, ...] | Site":
        """The sites of a kind at all layers; the site itself where the kind has no layers."""
        if kind.startswith("_"):
            # Also asked of an object that has no attributes yet, such as a copy under way.
            raise AttributeError(kind)
        if kind not in KINDS:
            raise AttributeError(f"{kind!r} is no kind of site. {self._name} has {', '.join(self.kinds)}.")
        if kind not in self.kinds:
            raise AttributeError(f"{self._name} has no {kind}. It has {', '.join(self.kinds)}.")
        sites = tuple(self(kind))
        return sites if sites[0].layer is not None else sites[0]

    def __dir__(self) -> list[str]:
        return [*self.kinds, "check", "check_edit", "kinds", "size"]

    def __iter__(self) -> Iterator[Site]:
        """All of them."""
        return iter(self(self.kinds))

    def check(self, site: Site) -> None:
        """Raise `MechsteerError` unless the model has the site."""
        n_layers = self._cfg.n_layers
        if site.layer is not None and site.layer >= n_layers:
            raise MechsteerError(
                f"{site!r} does not exist: {self._name} has layers 0 to {n_layers - 1}. Choose one of these."
            )
        n_heads = self.size(site, "head")
        if site.head is not None and n_heads is not None and site.head >= n_heads:
            raise MechsteerError(
                f"{site!r} does not exist: {site.kind} of {self._name} has heads 0 to {n_heads - 1}. "
                "Choose one of these."
            )
        if site.hook_name in self._found:
            return
        if site.kind in self._unused or site.hook_name not in self._hooked.hook_dict:
            raise MechsteerError(
                f"{site!r} does not exist: {self._name} has no hook point {site.hook_name}. "
                f"It has {', '.join(self.kinds)}."
            )
        self._found.add(site.hook_name)

    def check_edit(self, site: Site) -> None:
        """Raise `MechsteerError` unless the model has the site, and goes on with what a hook changes there."""
        self.check(site)
        if site.axes[-1] != "src" or backend_of(self._hooked) != "bridge":
            return
        if site.kind not in self._heard:
            self._heard[site.kind] = hears(self._hooked, site.hook_name)
        if not self._heard[site.kind]:
            raise MechsteerError(
                f"{site!r} can be recorded but not changed: {self._name} is a TransformerBridge whose attention does "
                'not use what a hook makes of it. Load the model with backend="hooked_transformer", or intervene at z.'
            )

    def size(self, site: Site, axis: str) -> int | None:
        """Size of an axis of the site's activations; None where it depends on the prompts."""
        cfg = self._cfg
        grouped = site.kind in ("k", "v", "rot_k") and not cfg.ungroup_grouped_query_attention
        n_heads = (cfg.n_key_value_heads if grouped else None) or cfg.n_heads
        sizes = {"d_model": cfg.d_model, "d_head": cfg.d_head, "d_mlp": cfg.d_mlp, "one": 1, "head": n_heads}
        return sizes.get(axis)

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        """For each kind, its name, hook name and axes."""
        for kind in self.kinds:
            site = Site(kind, 0) if "{layer}" in KINDS[kind].hook else Site(kind)
            sizes = [(axis, self.size(site, axis)) for axis in site.axes]
            yield kind, KINDS[kind].hook, ", ".join(axis if n is None else f"{axis}={n}" for axis, n in sizes)

    def __repr__(self) -> str:
        return f"Sites({self._name!r}, {self._cfg.n_layers} layers: {', '.join(self.kinds)})"

    def _repr_html_(self) -> str:
        rows = [(markup.code(kind), markup.code(hook), axes) for kind, hook, axes in self._rows()]
        about = f"of {self._name}, layers 0 to {self._cfg.n_layers - 1}"
        return markup.card("Sites", markup.table(("kind", "hook point", "axes"), rows), about=about)
