"""The *where* of everything: a kind of activation at a layer, optionally one head and one position."""

import difflib
import re
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from mechsteer import markup
from mechsteer.errors import MechsteerError

_RESID = ("batch", "pos", "d_model")
_HEADS = ("batch", "pos", "head", "d_head")
_SCORES = ("batch", "head", "dest", "src")
_MLP = ("batch", "pos", "d_mlp")
_SCALE = ("batch", "pos", "one")


class Kind(NamedTuple):
    """How TransformerLens names the hook point of a kind of site, and the axes of what flows through it."""

    hook: str
    axes: tuple[str, ...]


# In the order in which a forward pass meets them.
KINDS: dict[str, Kind] = {
    "embed": Kind("hook_embed", _RESID),
    "pos_embed": Kind("hook_pos_embed", _RESID),
    "resid_pre": Kind("blocks.{layer}.hook_resid_pre", _RESID),
    "ln1_scale": Kind("blocks.{layer}.ln1.hook_scale", _SCALE),
    "ln1_normalized": Kind("blocks.{layer}.ln1.hook_normalized", _RESID),
    "q": Kind("blocks.{layer}.attn.hook_q", _HEADS),
    "k": Kind("blocks.{layer}.attn.hook_k", _HEADS),
    "v": Kind("blocks.{layer}.attn.hook_v", _HEADS),
    "rot_q": Kind("blocks.{layer}.attn.hook_rot_q", _HEADS),
    "rot_k": Kind("blocks.{layer}.attn.hook_rot_k", _HEADS),
    "attn_scores": Kind("blocks.{layer}.attn.hook_attn_scores", _SCORES),
    "pattern": Kind("blocks.{layer}.attn.hook_pattern", _SCORES),
    "z": Kind("blocks.{layer}.attn.hook_z", _HEADS),
    "attn_out": Kind("blocks.{layer}.hook_attn_out", _RESID),
    "resid_mid": Kind("blocks.{layer}.hook_resid_mid", _RESID),
    "ln2_scale": Kind("blocks.{layer}.ln2.hook_scale", _SCALE),
    "ln2_normalized": Kind("blocks.{layer}.ln2.hook_normalized", _RESID),
    "mlp_pre": Kind("blocks.{layer}.mlp.hook_pre", _MLP),
    "mlp_pre_linear": Kind("blocks.{layer}.mlp.hook_pre_linear", _MLP),
    "mlp_post": Kind("blocks.{layer}.mlp.hook_post", _MLP),
    "mlp_out": Kind("blocks.{layer}.hook_mlp_out", _RESID),
    "resid_post": Kind("blocks.{layer}.hook_resid_post", _RESID),
    "ln_final_scale": Kind("ln_final.hook_scale", _SCALE),
    "ln_final_normalized": Kind("ln_final.hook_normalized", _RESID),
}
KindName = Literal[
    "embed", "pos_embed", "resid_pre", "ln1_scale", "ln1_normalized", "q", "k", "v", "rot_q", "rot_k", "attn_scores",
    "pattern", "z", "attn_out", "resid_mid", "ln2_scale", "ln2_normalized", "mlp_pre", "mlp_pre_linear", "mlp_post",
    "mlp_out", "resid_post", "ln_final_scale", "ln_final_normalized",
]  # fmt: skip
"""The kinds of `KINDS`, so that editors complete them."""
_BY_HOOK = {kind.hook: name for name, kind in KINDS.items()}
_INDEXED = re.compile(r"^(?P<hook>[^\[\]]+?)(?:\[(?P<index>[^\[\]]*)\])?$")


@dataclass(frozen=True)
class Site:
    """A hook point, and optionally one head or one position of it.

        Site("resid_pre", 3)                       # blocks.3.hook_resid_pre
        Site("z", 4, head=2)                       # one head's output
        Site("resid_post", 3, pos=5)               # one absolute position; -1 is the prompt's last
        Site.of("blocks.3.hook_resid_pre"), Site.of(("resid_pre", 3)), Site.of("embed")

    Attributes:
        kind: one of `KINDS`.
        layer: the block, from 0; None for kinds outside the blocks.
        head: for kinds with a head axis. `k` and `v` of a model with grouped-query attention have as many heads as it
            has key-value heads.
        pos: absolute position: 0 is the first real token whatever the padding, and negative positions count back from
            the end of the prompt (generated tokens do not move them). For `pattern` and `attn_scores` the destination.

    Raises:
        MechsteerError: the kind does not exist, or layer or head do not go with it.
    """

    kind: KindName | str
    layer: int | None = None
    head: int | None = field(default=None, kw_only=True)
    pos: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MechsteerError(
                f"Site kind {self.kind!r} does not exist. {_nearest(self.kind, list(KINDS))} "
                "Site.of also takes TransformerLens's hook names."
            )
        in_block = "{layer}" in KINDS[self.kind].hook
        if in_block and (self.layer is None or self.layer < 0):
            raise MechsteerError(
                f"Site({self.kind!r}, {self.layer}) needs a layer counted from 0, such as Site({self.kind!r}, 3)."
            )
        if not in_block and self.layer is not None:
            raise MechsteerError(f"Site({self.kind!r}) lies outside the blocks and takes no layer, got {self.layer}.")
        if self.head is not None and ("head" not in self.axes or self.head < 0):
            heads = ", ".join(kind for kind, entry in KINDS.items() if "head" in entry.axes)
            raise MechsteerError(
                f"Site({self.kind!r}, head={self.head}): heads count from 0 and exist at {heads}. Leave head out."
            )

    @staticmethod
    def of(site: "SiteLike") -> "Site":
        """The Site that a hook name or short form stands for.

        Args:
            site: a Site; a hook name such as "blocks.3.hook_resid_pre"; what `str(site)` gives, which may end in
                "[head=2,pos=5]"; a kind that has no layer, such as "embed"; or ("resid_pre", 3).

        Raises:
            MechsteerError: it stands for no known site; the message lists the nearest.
        """
        if isinstance(site, Site):
            return site
        if isinstance(site, tuple) and len(site) == 2:
            return Site(*site)
        if not isinstance(site, str):
            raise MechsteerError(
                f"{site!r} is no site. Pass a Site, a hook name such as 'blocks.3.hook_resid_pre', or ('resid_pre', 3)."
            )
        if site in KINDS:
            return Site(site)
        match = _INDEXED.match(site)
        hook, index = (match["hook"], match["index"]) if match else (site, None)
        found = re.match(r"^blocks\.(\d+)\.(.*)$", hook)
        template = f"blocks.{{layer}}.{found[2]}" if found else hook
        if template not in _BY_HOOK:
            near = _nearest(template, list(_BY_HOOK)).replace("{layer}", found[1] if found else "0")
            raise MechsteerError(f"Hook name {site!r} is no site that mechsteer knows. {near}")
        try:
            parts = [] if index is None else [part.split("=") for part in index.split(",")]
            return Site(
                _BY_HOOK[template], int(found[1]) if found else None, **{key: int(value) for key, value in parts}
            )
        except (TypeError, ValueError) as error:
            if isinstance(error, MechsteerError):
                raise
            raise MechsteerError(
                f"{site!r} cannot be read: after the hook name comes nothing or [head=2], [pos=5] or [head=2,pos=5]."
            ) from error

    @property
    def hook_name(self) -> str:
        """TransformerLens's name of the hook point."""
        return KINDS[self.kind].hook.format(layer=self.layer)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of the activation, `batch` first."""
        return KINDS[self.kind].axes

    @property
    def point(self) -> "Site":
        """The whole hook point: this site without head and position."""
        return self if self.head is None and self.pos is None else Site(self.kind, self.layer)

    @property
    def order(self) -> tuple[int, int]:
        """Sorts sites as a forward pass meets them."""
        rank = list(KINDS).index(self.kind)
        outside = -1 if self.kind in ("embed", "pos_embed") else 1_000_000
        return (outside if self.layer is None else self.layer, rank)

    def at(self, **changes: int | None) -> "Site":
        """The same site with another layer, head or position."""
        return replace(self, **changes)

    def __str__(self) -> str:
        index = [f"{name}={value}" for name, value in (("head", self.head), ("pos", self.pos)) if value is not None]
        return self.hook_name + (f"[{','.join(index)}]" if index else "")

    def __repr__(self) -> str:
        parts = [repr(self.kind), *([str(self.layer)] if self.layer is not None else [])]
        parts += [f"{name}={value}" for name, value in (("head", self.head), ("pos", self.pos)) if value is not None]
        return f"Site({', '.join(parts)})"

    def _repr_html_(self) -> str:
        rows = {"hook point": markup.code(self), "axes": ", ".join(self.axes)}
        return markup.card("Site", markup.facts(rows), about=repr(self).removeprefix("Site(")[:-1])


SiteLike = Site | KindName | str | tuple[KindName | str, int]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"Nearest: {', '.join(near)}." if near else f"Known: {', '.join(known)}."
