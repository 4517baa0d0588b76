"""The typed activation cache."""

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mechsteer import markup
from mechsteer.errors import MechsteerError
from mechsteer.files import open_tensors, save_tensors, stamp
from mechsteer.prompts import Prompts, Side
from mechsteer.site import KindName, Site, SiteLike

FORMAT, FORMAT_VERSION = "activations", 1
_PROMPT_TENSORS = ("tokens", "mask", "roles", "slots")
# Axes that run over the tokens of the prompts.
_TOKEN_AXES = ("pos", "dest", "src")

Value = TypeVar("Value")


class ModelId(NamedTuple):
    """Which weights something was made with: two models with the same `hash` compute the same."""

    name: str
    hash: str
    processed: bool


# The models of this process whose weights were hashed, for what can be said of an artefact without loading anything.
_at_hand: defaultdict[str, WeakSet[Any]] = defaultdict(WeakSet)


def remember(made_with: ModelId, model: Any) -> None:
    """Note that a `Model` with these weights is in memory; it is not kept there."""
    _at_hand[made_with.hash].add(model)


def at_hand(made_with: ModelId | None) -> Any:
    """A `Model` with these weights, if there is one in memory; else None."""
    return None if made_with is None else next(iter(_at_hand.get(made_with.hash, ())), None)


class MissingSiteError(MechsteerError, KeyError):
    """A site was asked for that was not recorded. Also a `KeyError`, as mappings raise."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # KeyError's own would put the message in quotes


class SiteMap(Mapping[Site, Value]):
    """Immutable mapping from sites, in the order of a forward pass, that takes hook names and short forms as well."""

    def __init__(self, values: Mapping[Site, Value]) -> None:
        self._values = dict(sorted(values.items(), key=lambda item: (item[0].order, str(item[0]))))

    def __getitem__(self, site: SiteLike) -> Value:
        wanted = Site.of(site)
        if wanted not in self._values:
            raise _missing(wanted, self._values)
        return self._values[wanted]

    def __contains__(self, site: object) -> bool:
        return Site.of(site) in self._values  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    # Mapping's own compares the values, which tensors answer with a tensor.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"SiteMap({', '.join(map(str, self))})"

    def _repr_html_(self) -> str:
        rows = [(markup.code(site), markup.brief(value)) for site, value in self.items()]
        return markup.card("SiteMap", markup.table(("site", "value"), rows), about=f"{len(self)} sites")

    def _ipython_key_completions_(self) -> list[Any]:
        """What Tab offers inside the brackets: hook names and short forms."""
        short = [site.kind if site.layer is None else (site.kind, site.layer) for site in self]
        return [*map(str, self), *short]


class Activations(SiteMap[Tensor]):
    """Immutable mapping Site -> tensor, laid out as the prompts are ([batch, pos, ...] or [batch, head, dest, src]).

        acts["resid_post", 3], acts["blocks.3.hook_resid_post"]      # [batch, pos, d_model]
        acts[Site("z", 4, head=2)]                                   # [batch, pos, d_head]
        acts[Site("resid_post", 3, pos=-1)]                          # [batch, d_model], the prompts' last tokens
        acts.span("user")["resid_post", 3]                           # [row, d_model], one row per token
        (clean - corrupt).mean()["resid_post", 3]                    # [d_model]

    Attributes:
        prompts: what the model was run on.
        model: the model that was run.
    """

    def __init__(self, values: Mapping[Site, Tensor], *, prompts: Prompts, model: ModelId) -> None:
        """
        Args:
            values: whole hook points (no head, no position), each with the axes of its site.
            prompts: give the sizes of the axes batch, pos, dest and src.
            model: the model that computed the values.

        Raises:
            MechsteerError: a tensor's shape does not fit its site and the prompts, or a site has a head or position.
        """
        for site, value in values.items():
            _check_shape(site, value, prompts)
        super().__init__(values)
        self.prompts = prompts
        self.model = model

    def __getitem__(self, site: SiteLike) -> Tensor:
        """The activation of a hook point, or of one head or absolute position of it (that axis is dropped).

        Raises:
            MissingSiteError: the hook point was not recorded.
            MechsteerError: there is no such head or position.
        """
        wanted = Site.of(site)
        value, axes = super().__getitem__(wanted.point), wanted.axes
        if wanted.head is not None:
            heads = value.shape[axes.index("head")]
            if wanted.head >= heads:
                raise MechsteerError(f"{wanted!r} does not exist: it has {heads} heads, counted from 0.")
            value = value.select(axes.index("head"), wanted.head)
        if wanted.pos is not None:
            by_token = value if "dest" not in axes or wanted.head is not None else value.movedim(2, 1)
            value = by_token[self.prompts.at(wanted.pos).to(value.device)]
        return value

    def __contains__(self, site: object) -> bool:
        """Whether the site's hook point was recorded."""
        return super().__contains__(Site.of(site).point)  # type: ignore[arg-type]

    # --- choosing

    def select(
        self,
        *,
        kind: KindName | str | Collection[str] | None = None,
        layer: int | Collection[int] | None = None,
        sites: Iterable[SiteLike] | None = None,
    ) -> "Activations":
        """The sites that fit everything that is given.

        Args:
            kind: one kind of site, or several.
            layer: one layer, or several such as `range(3, 6)`.
            sites: hook points, all of which must have been recorded.

        Raises:
            MissingSiteError: one of `sites` was not recorded, or no recorded site fits.
        """
        points = list(self) if sites is None else [Site.of(site).point for site in sites]
        kinds = (kind,) if isinstance(kind, str) else kind
        layers = (layer,) if isinstance(layer, int) else layer
        chosen = [
            site
            for site in points
            if (kinds is None or site.kind in kinds) and (layers is None or site.layer in layers)
        ]
        if not chosen:
            raise MissingSiteError(
                f"select(kind={kind!r}, layer={layer!r}) fits no recorded site. Recorded: {_listed(self)}."
            )
        return self._with({site: self[site] for site in chosen})

    def example(self, index: int | slice | Sequence[int] | Tensor) -> "Activations":
        """The activations of some prompts, in the layout of all; an int keeps the batch axis, with size 1."""
        prompts = self.prompts[index]
        rows = torch.arange(len(self.prompts), device=self.prompts.mask.device)
        rows = rows[list(index) if isinstance(index, Sequence) else index].reshape(-1)
        return self._with({site: value[rows.to(value.device)] for site, value in self.items()}, prompts=prompts)

    def at(self, where: Bool[Tensor, "batch pos"]) -> SiteMap[Tensor]:
        """Per site the values [row, ...] at the tokens that `where` marks, in the order of (batch, pos).

        Of `pattern` and `attn_scores` these are destinations: [row, head, src].

        Raises:
            MechsteerError: `where` has another shape than the prompts, or marks padding.
        """
        check_where(where, self.prompts)
        return SiteMap({site: _by_token(site, value)[where.to(value.device)] for site, value in self.items()})

    def span(self, name: str) -> SiteMap[Tensor]:
        """`at` the tokens of a role, such as "user"."""
        return self.at(self.prompts.span(name))

    def mean(self, where: Bool[Tensor, "batch pos"] | None = None) -> SiteMap[Tensor]:
        """Per site the mean over the tokens that `where` marks, summed in fp64 and returned in fp32.

        Args:
            where: None means all real tokens. Every token weighs the same, so long prompts weigh more.

        Raises:
            MechsteerError: `where` marks no token, marks padding, or has another shape than the prompts.
        """
        marked = self.prompts.mask if where is None else where
        if not bool(marked.any()):
            raise MechsteerError("mean(where) got a `where` that marks no token. Mark at least one, or leave it out.")
        return SiteMap({site: rows.mean(0, dtype=torch.float64).float() for site, rows in self.at(marked).items()})

    def stack(self, kind: KindName | str) -> Float[Tensor, "layer batch ..."]:
        """One kind of site at all its recorded layers, in ascending order, as one tensor.

        Raises:
            MissingSiteError: the kind was not recorded.
            MechsteerError: the kind is outside the blocks, or has other shapes at other layers.
        """
        chosen = self.select(kind=kind)
        if None in (site.layer for site in chosen):
            raise MechsteerError(
                f"stack({kind!r}) needs a kind with layers. This one is a single tensor: acts[{kind!r}]."
            )
        shapes = {tuple(value.shape): site for site, value in chosen.items()}
        if len(shapes) > 1:
            named = ", ".join(f"{site} has {list(shape)}" for shape, site in shapes.items())
            raise MechsteerError(
                f"stack({kind!r}) needs the same shape at all layers, but {named}. Take them one by one."
            )
        return torch.stack(list(chosen.values()))

    def padded(self, side: Side) -> "Activations":
        """The same activations with padding on that side, no wider than the longest prompt; zeros at padding."""
        prompts = self.prompts.padded(side)
        if prompts is self.prompts:
            return self
        first = self.prompts.mask.int().argmax(1, keepdim=True)
        source = first + prompts.positions.clamp(min=0)
        return self._with(
            {site: _laid_out(site, value, source, prompts.mask) for site, value in self.items()}, prompts=prompts
        )

    def to(self, target: str | torch.device | torch.dtype) -> "Activations":
        """The same activations on a device, or with another dtype (the prompts' ids stay as they are)."""
        prompts = self.prompts if isinstance(target, torch.dtype) else self.prompts.to(target)
        return self._with({site: value.to(target) for site, value in self.items()}, prompts=prompts)

    # --- arithmetic, site by site

    def __add__(self, other: "Activations") -> "Activations":
        return self._combined(other, torch.add, "+")

    def __sub__(self, other: "Activations") -> "Activations":
        """The difference, token by token; its prompts are those of the left side.

        Raises:
            MechsteerError: the sites, the models or the lengths of the prompts differ.
        """
        return self._combined(other, torch.sub, "-")

    def __mul__(self, factor: float | int) -> "Activations":
        if not isinstance(factor, float | int):
            return NotImplemented
        return self._with({site: value * factor for site, value in self.items()})

    __rmul__ = __mul__

    def __neg__(self) -> "Activations":
        return self * -1

    def _combined(
        self, other: "Activations", operation: Callable[[Tensor, Tensor], Tensor], sign: str
    ) -> "Activations":
        if not isinstance(other, Activations):
            return NotImplemented
        if self.model.hash != other.model.hash:
            raise MechsteerError(
                f"activations {sign} activations: they are of two models, {_named(self.model)} and "
                f"{_named(other.model)}. Record both with one model."
            )
        lonely = sorted(map(str, set(self) ^ set(other)))
        if lonely:
            raise MechsteerError(
                f"activations {sign} activations: {', '.join(lonely)} stands on one side only. "
                "Record the same sites, or use .select(sites=...) on both."
            )
        mine, theirs = self.prompts.lengths.tolist(), other.prompts.lengths.tolist()
        if mine != theirs:
            pairs = enumerate(zip(mine, theirs, strict=False))
            odd = (f"prompt {row} has {one} and {two} tokens" for row, (one, two) in pairs if one != two)
            got = next(odd, f"{len(mine)} and {len(theirs)} prompts")
            raise MechsteerError(
                f"activations {sign} activations: their prompts must be as many and as long, got {got}. "
                "Align the prompts."
            )
        if not torch.equal(self.prompts.mask, other.prompts.mask):
            return self.padded("right")._combined(other.padded("right"), operation, sign)
        return self._with({site: operation(value, other[site]) for site, value in self.items()})

    def _with(self, values: Mapping[Site, Tensor], *, prompts: Prompts | None = None) -> "Activations":
        return Activations(values, prompts=self.prompts if prompts is None else prompts, model=self.model)

    # --- showing

    def __repr__(self) -> str:
        lines = [self._headline(), *(f"  {site}  {axes}  {kind}" for site, axes, kind in self._table())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [
            (markup.code(site), axes, kind, markup.size(self._values[site].nbytes))
            for site, axes, kind in self._table()
        ]
        total = sum(value.nbytes for value in self._values.values())
        title, about = self._headline().split(" ", 1)
        shown = markup.table(("site", "axes", "values", "size"), rows)
        return markup.card(title, shown, markup.faded(f"{markup.size(total)} in all"), about=about)

    def _headline(self) -> str:
        lengths = self.prompts.lengths.tolist() or [0]
        span = f"{min(lengths)}" if min(lengths) == max(lengths) else f"{min(lengths)} to {max(lengths)}"
        return f"Activations of {_named(self.model)} on {len(self.prompts)} prompts of {span} tokens, {len(self)} sites"

    def _table(self) -> Iterator[tuple[Site, str, str]]:
        for site, value in self.items():
            axes = ", ".join(f"{name}={size}" for name, size in zip(site.axes, value.shape, strict=True))
            yield site, f"[{axes}]", f"{str(value.dtype).removeprefix('torch.')} on {value.device}"

    # --- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: a tensor per site under its hook name, and the prompts' ids and spans.

        A file of that name is replaced once the new one is whole. The tokenizer is not saved.
        """
        tensors = {str(site): value for site, value in self.items()}
        save_tensors(path, tensors | prompt_tensors(self.prompts), manifest_of(self.prompts, self.model, self))

    @staticmethod
    def load(
        path: str | os.PathLike[str], *, model: Any = None, sites: Iterable[SiteLike] | None = None
    ) -> "Activations":
        """Read what `save` wrote. Values are memory-mapped: they are read from disk when they are used.

        Args:
            path: the file.
            model: a `Model`, which must be the one that was recorded, and whose tokenizer the prompts get; None leaves
                them without a tokenizer.
            sites: which hook points to read; None reads all.

        Raises:
            MissingSiteError: one of `sites` is not in the file.
            MechsteerError: the file is missing, damaged, of another format, or of another model.
        """
        with open_tensors(path, format=FORMAT, version=FORMAT_VERSION) as (file, manifest):
            saved = ModelId(**manifest["model"])
            if model is not None:
                model.check_same(saved, os.fspath(path))
            held = [Site.of(name) for name in manifest["sites"]]
            wanted = held if sites is None else [Site.of(site).point for site in sites]
            for site in wanted:
                if site not in held:
                    raise _missing(site, held)
            prompts = Prompts(
                **{name: file.get_tensor(name) for name in _PROMPT_TENSORS},
                labels=tuple(map(str, manifest["labels"])),
                tokenizer=None if model is None else model.tokenizer,
            )
            return Activations({site: file.get_tensor(str(site)) for site in wanted}, prompts=prompts, model=saved)


def prompt_tensors(prompts: Prompts) -> dict[str, Tensor]:
    """What a file of activations holds of the prompts, beside the manifest."""
    return {name: getattr(prompts, name) for name in _PROMPT_TENSORS}


def manifest_of(prompts: Prompts, model: ModelId, sites: Iterable[Site]) -> dict[str, Any]:
    """The manifest of a file of activations."""
    axes = {str(site): list(site.axes) for site in sites}
    about = {"model": model._asdict(), "labels": list(prompts.labels), "sites": axes}
    return {**stamp(FORMAT, FORMAT_VERSION), **about}


def check_where(where: Bool[Tensor, "..."], prompts: Prompts) -> None:
    """Refuse a mask over tokens that does not fit the prompts.

    Raises:
        MechsteerError: it has another shape or dtype, or marks padding.
    """
    if where.shape != prompts.mask.shape or where.dtype != torch.bool:
        raise MechsteerError(
            f"`where` is {str(where.dtype).removeprefix('torch.')} {list(where.shape)}, but marks tokens of prompts "
            f"[batch, pos] = {list(prompts.mask.shape)}. Pass a bool of that shape, such as prompts.span('user')."
        )
    beyond = where & ~prompts.mask.to(where.device)
    if bool(beyond.any()):
        raise MechsteerError(
            f"`where` marks {int(beyond.sum())} padding tokens, which have no meaning. Pass where & prompts.mask."
        )


def _check_shape(site: Site, value: Shaped[Tensor, "..."], prompts: Prompts) -> None:
    if site != site.point:
        raise MechsteerError(
            f"Activations got a value for {site!r}, but hold whole hook points. Pass all of {site.point!r}, and take "
            "its part by acts[site]."
        )
    batch, pos = prompts.tokens.shape
    sizes = {"batch": batch, "one": 1} | dict.fromkeys(_TOKEN_AXES, pos)
    fits = value.ndim == len(site.axes) and all(
        sizes.get(name, size) == size for name, size in zip(site.axes, value.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(f"{name}={sizes[name]}" if name in sizes else name for name in site.axes)
        raise MechsteerError(
            f"Activations at {site} have shape {list(value.shape)}, expected [{expected}]. "
            "Pass the prompts that were run, in the same layout."
        )


def _by_token(site: Site, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "batch pos ..."]:
    return value.movedim(2, 1) if "dest" in site.axes else value


def _laid_out(
    site: Site, value: Shaped[Tensor, "..."], source: Int[Tensor, "batch new"], mask: Bool[Tensor, "batch new"]
) -> Shaped[Tensor, "..."]:
    """The value with its token axes in another layout, whose column j holds what stood in column `source[:, j]`."""
    source, mask = source.to(value.device), mask.to(value.device)
    rows = torch.arange(len(source), device=value.device)[:, None]
    for axis, name in enumerate(site.axes):
        if name in _TOKEN_AXES:
            taken = value.movedim(axis, 1)[rows, source]
            keep = mask.view(*mask.shape, *[1] * (taken.ndim - 2))
            value = torch.where(keep, taken, torch.zeros_like(taken)).movedim(1, axis)
    return value


def _missing(site: Site, recorded: Iterable[Site]) -> MissingSiteError:
    held = list(recorded)
    if not held:
        return MissingSiteError(f"{site} was not recorded: nothing was. Run the model with record=[{str(site)!r}].")
    near = sorted(
        held, key=lambda other: (other.kind != site.kind, abs((other.layer or 0) - (site.layer or 0)), other.order)
    )
    return MissingSiteError(
        f"{site} was not recorded. Nearest recorded: {_listed(near[:3])}. "
        f"Run the model with record=[{str(site)!r}] too."
    )


def _listed(sites: Iterable[Site]) -> str:
    return ", ".join(map(str, sites))


def _named(model: ModelId) -> str:
    return f"{model.name!r} ({model.hash[:8]}{', processed' if model.processed else ''})"
