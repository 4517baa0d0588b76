"""The model noun: a hooked model with its tokenizer, and how to load one."""

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsteer import backends, generation, markup, memory, offload
from mechsteer.activations import Activations, ModelId, check_where, remember
from mechsteer.backends import Hooked
from mechsteer.backends.states import covers, states_at
from mechsteer.backends.weights import add_bias, add_rank, orthogonalise, unembedding
from mechsteer.data import data_path
from mechsteer.errors import MechsteerError, ModelLoadError
from mechsteer.hooks import Intervention, fwd_hooks, never_fired, with_recorders
from mechsteer.interventions import SoftPrefix
from mechsteer.prompts import Prompts
from mechsteer.run import Run
from mechsteer.site import Site, SiteLike
from mechsteer.sites import Sites

PromptsLike = Prompts | str | Sequence[str] | Tensor
"""Prompts, text or texts for the model's tokenizer, or token ids [batch, pos] without padding."""

# Models that ship with mechsteer, by the name that `load_model` takes.
SHIPPED_MODELS = ("pocket", "pocket-1l")
# Weights that are hashed in a moment; of more a notebook shows the hash only if it is known.
_SMALL = 10_000_000


class Model:
    """A TransformerLens model and its tokenizer.

    `load_model` makes one from a name or a folder. To use a model that you already have, wrap it:
    `Model(HookedTransformer.from_pretrained_no_processing("gpt2"))`.

    Attributes:
        hooked: the `HookedTransformer` or `TransformerBridge`; both have hook names like `blocks.3.hook_resid_pre`.
        tokenizer: turns text into token ids. After `load_model` it is the one that transformers loads, unchanged.
        name: what the model was loaded as, for reports and errors.
        backend: "hooked_transformer" or "bridge".
        processed: whether weights were folded or centred after loading. `load_model` never does that, so that
            activations match Hugging Face's and published SAEs.
        sites: the sites that it has, such as `model.sites.resid_post[3]`; see `Sites`.
    """

    def __init__(self, hooked: Hooked, *, tokenizer: Any = None, name: str | None = None) -> None:
        """Wrap a model.

        Args:
            hooked: a `HookedTransformer` or a `TransformerBridge`.
            tokenizer: a transformers tokenizer; None takes the hooked model's own.
            name: None takes the name in the hooked model's config.

        Raises:
            MechsteerError: `hooked` is neither of the two.
        """
        backend = backends.backend_of(hooked)
        if backend is None:
            raise MechsteerError(
                f"Model got a {type(hooked).__name__}, but wraps a HookedTransformer or a TransformerBridge. "
                "Pass one of those, or use load_model with a name or folder."
            )
        self.hooked: Hooked = hooked
        self.tokenizer: Any = hooked.tokenizer if tokenizer is None else tokenizer
        self.name: str = str(hooked.cfg.model_name) if name is None else name
        self.backend = backend
        self.processed: bool = backends.is_processed(hooked)
        self.sites: Sites = Sites(hooked, self.name)
        # What was computed from the weights, and the fingerprint of the weights it was computed from.
        self._id: tuple[Any, ModelId] | None = None
        self._decoder: tuple[Any, Any] | None = None

    @property
    def cfg(self) -> Any:
        """TransformerLens's config of the model."""
        return self.hooked.cfg

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return self.cfg.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.cfg.d_model

    @property
    def d_vocab(self) -> int:
        """Number of token ids that the model can embed."""
        return self.cfg.d_vocab

    @property
    def n_ctx(self) -> int:
        """Largest number of positions."""
        return self.cfg.n_ctx

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.hooked.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.hooked.parameters()).dtype

    @property
    def id(self) -> ModelId:
        """Name and hash of the weights, which every artefact made with the model carries."""
        # Asked for by every run, so it does not read the weights; `decoder` does, and forgets this when they changed.
        weights = backends.places(self.hooked)
        if self._id is None or self._id[0] != weights:
            self._id = weights, ModelId(self.name, backends.weights_hash(self.hooked), self.processed)
            remember(self._id[1], self)
        return self._id[1]

    @property
    def has_decoder(self) -> bool:
        """Whether `decoder` is in memory."""
        return self._decoder is not None and self._decoder[1] is not None

    @property
    def decoder(self) -> Any:
        """The packed forward pass (`mechsteer.backends.decoder`) of the present weights, or None where the model does
        something that it does not cover; then sweeps and generation go through hooks."""
        weights = backends.fingerprint(self.hooked)
        if self._decoder is None or self._decoder[0] != weights:
            self._decoder = weights, backends.build_decoder(self.hooked)
            self._id = None
        return self._decoder[1]

    # ---- running ----

    def run(
        self,
        prompts: PromptsLike,
        interventions: Iterable[Intervention] = (),
        record: Iterable[SiteLike] | SiteLike = (),
        *,
        logits: str | Bool[Tensor, "batch pos"] = "all",
        grad: bool = False,
        out: str | os.PathLike[str] | None = None,
        memory: float = 0.5,
    ) -> Run:
        """One forward pass: the only place where hooks are attached, and they are always gone afterwards.

        Args:
            prompts: what to run.
            interventions: applied in this order where they meet at one hook point; earlier hook points come first.
            record: sites to record; a kind without a layer, such as "resid_post", stands for all layers. What is
                recorded is what flows on, after the interventions there.
            logits: "all", "last" (of each prompt, before any completion), "none", or a mask of the tokens wanted.
            grad: whether gradients can flow, to weights and to what interventions hold.
            out: a file for the activations, as `Activations.save` writes it, which they are then memory-mapped from.
            memory: share of the free memory that activations may take. Those that would take more are recorded a few
                prompts at a time into a temporary file, or `out`, and one line says so. Not with `grad`.

        Raises:
            MechsteerError: prompts, interventions or sites do not fit the model, or an intervention never fires.
        """
        given = self.prompts(prompts)
        right = given.padded("right")
        sites = self.sites(record)
        read = _read(given, logits)
        applied, index = tuple(interventions), torch.arange(len(given), device=read.device)
        edits = fwd_hooks(applied, self, right)
        if sites and not grad and (out is not None or offload.too_large(self, right, sites, memory)):
            relaid = _relaid(read, given, right)
            rows, activations = offload.recorded(self, given, applied, sites, relaid, out)
            return Run(given, rows, read, activations, index)
        with torch.set_grad_enabled(grad):
            rows, taken = self.forward(right, edits, sites, read=_relaid(read, given, right))
            values = {site: offload.relay(taken[site], site, right, given) for site in sites}
        activations = Activations(values, prompts=given, model=self.id)
        return Run(given, rows, read, activations, index)

    def forward(
        self,
        right: Prompts,
        edits: Sequence[tuple[str, Callable[..., Any]]],
        sites: Sequence[Site],
        *,
        read: Bool[Tensor, "batch pos"],
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        """Logits at `read`, and the sites' activations, of right-padded prompts under hooks that edit.

        Raises:
            MechsteerError: the model does not run a hook point that is edited or recorded.
        """
        taken: dict[Site, Tensor] = {}
        device = self.device  # where all that comes out is, whatever device a layer is on

        def recorder(site: Site) -> Callable[..., None]:
            def take(tensor: Float[Tensor, "..."], hook: Any) -> None:
                taken[site] = tensor.to(device)

            return take

        hooks = with_recorders(edits, [(site.hook_name, recorder(site)) for site in sites])
        stop = None
        if not bool(read.any()) and all(site.layer is not None or site.order[0] < 0 for site in sites):
            stop = max((site.order[0] for site in sites), default=-1) + 1
        # In the padding anything may stand, also what is no id of this model.
        tokens = right.tokens.masked_fill(~right.mask, 0).to(device)
        with backends.hooks(self.hooked, hooks):
            rows = backends.logits_at(self.hooked, tokens, read.to(device), stop=stop)
        silent = [site.hook_name for site in sites if site not in taken]
        silent += never_fired(edits) if stop is None else []
        if silent:
            raise MechsteerError(f"{self.name} has a hook point {silent[0]}, but never runs it. Choose another site.")
        return rows, taken

    def states_at(
        self, prompts: Prompts, sites: Iterable[SiteLike] | SiteLike, where: Bool[Tensor, "batch pos"]
    ) -> dict[Site, Float[Tensor, "row ..."]]:
        """What `run(prompts, record=sites).activations.at(where)` gives, where it can from the packed forward pass, in
        less time and memory. No gradients.

        Raises:
            MechsteerError: as `run`, or `where` has another shape than the prompts or marks padding.
        """
        given, points = self.prompts(prompts), self.sites(sites)
        check_where(where, given)
        right = given.padded("right")
        self.check_slots(right, ())
        marked = _relaid(where.to(right.mask.device), given, right)
        plain = bool(marked.any()) and not backends.is_hooked(self.hooked) and covers(self.cfg, points)
        decoder = self.decoder if plain else None
        if decoder is None:
            recorded = self.run(right, record=points, logits="none").activations.at(marked)
            return {site: recorded[site] for site in points}
        with torch.no_grad():
            return states_at(decoder, right, points, marked)

    def generate(
        self,
        prompts: PromptsLike,
        *,
        max_new_tokens: int = 40,
        interventions: Iterable[Intervention] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_at_eos: bool = True,
        batch_size: int = 128,
        progress: bool = True,
    ) -> Prompts:
        """Complete prompts, under interventions that go on for every generated token.

            steered = model.generate(prompts, interventions=[ms.Add(cats, 4.0)])
            print(steered.completions)

        Keys and values are cached (except for architectures and sites that the packed forward pass does not cover,
        where every step is a whole forward pass). Completions do not depend on the batch that a prompt is in. Ids that
        the tokenizer has no token for, which some vocabularies end in, are never chosen.

        Args:
            prompts: without completions.
            max_new_tokens: at most this many tokens each.
            interventions: see `run`. Generated tokens are of the span "completion"; positions count on.
            temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
            top_k: draw from the likeliest this many only. Like `top_p`, it needs a temperature above 0.
            top_p: draw from the fewest tokens that together have this probability; applied after `top_k`.
            seed: of the draws. Every prompt has its own stream, fixed by seed and place in `prompts`.
            stop_at_eos: end a completion with the tokenizer's end-of-sequence token, which belongs to it.
            batch_size: prompts generated side by side.
            progress: show a bar on standard error when it takes longer than two seconds.

        Returns:
            The prompts with completions: `.completions` has their texts.

        Raises:
            MechsteerError: prompts or interventions do not fit the model, tokens would pass the context's end, an
                option is out of its range, or logits become infinite or NaN.
        """
        return generation.generate(
            self, self.prompts(prompts), max_new_tokens=max_new_tokens, interventions=interventions,
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop_at_eos=stop_at_eos,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip

    def prompts(self, prompts: PromptsLike) -> Prompts:
        """Prompts on the model's device, checked against its vocabulary and context.

        Raises:
            MechsteerError: no prompts, an empty one, one that is longer than the context, or ids that the model lacks.
        """
        if isinstance(prompts, Prompts):
            out = prompts
        elif isinstance(prompts, Tensor):
            out = Prompts.from_ids(prompts, tokenizer=self.tokenizer)
        else:
            out = Prompts.from_strings([prompts] if isinstance(prompts, str) else list(prompts), self.tokenizer)
        longest = int(out.lengths.max())
        if longest > self.n_ctx:
            raise MechsteerError(
                f"Prompt {int(out.lengths.argmax())} has {longest} tokens, but the context of {self.name} is "
                f"{self.n_ctx}. Shorten it."
            )
        highest = int(torch.where(out.mask, out.tokens, 0).max())
        if highest >= self.d_vocab:
            raise MechsteerError(
                f"A prompt holds token id {highest}, but the vocabulary of {self.name} has {self.d_vocab} tokens. "
                "Make the prompts with this model's tokenizer."
            )
        return out.to(self.device)

    # ---- what fits this model ----

    def check_site(self, site: Site) -> None:
        """Raise `MechsteerError` unless the model has the site."""
        self.sites.check(site)

    def check_edit(self, site: Site) -> None:
        """Raise `MechsteerError` unless the model has the site, and goes on with what a hook changes there."""
        self.sites.check_edit(site)

    def size(self, site: Site, axis: str) -> int | None:
        """Size of an axis of the site's activations; None where it depends on the prompts."""
        return self.sites.size(site, axis)

    def width(self, site: Site) -> int | None:
        """Size of the site's last axis; None where it depends on the prompts."""
        return self.size(site, site.axes[-1])

    def check_width(self, site: Site, width: int, what: str) -> None:
        """Raise `MechsteerError` unless the site's activations have this width."""
        expected = self.width(site)
        if expected is not None and width != expected:
            raise MechsteerError(
                f"{what} got {site.axes[-1]}={width}, but {site!r} of {self.name} has {expected}. "
                "Record it from the same model."
            )

    def check_same(self, made_with: ModelId | None, what: str) -> None:
        """Raise `MechsteerError` unless something was made with the weights of this model."""
        if made_with is None or made_with.hash == self.id.hash:
            return
        if made_with.processed != self.processed:
            words = {True: "folded or centred weights", False: "unprocessed weights"}
            raise MechsteerError(
                f"{what} was made with {words[made_with.processed]} of {made_with.name}, and {self.name} here has "
                f"{words[self.processed]}. Make it again from the model that you run."
            )
        raise MechsteerError(
            f"{what} was made with {made_with.name} (weights {made_with.hash[:12]}), and this is {self.name} (weights "
            f"{self.id.hash[:12]}). Make it again from the model that you run."
        )

    def check_slots(self, prompts: Prompts, interventions: Sequence[Intervention]) -> None:
        """Raise `MechsteerError` where prompts reserve slots that nothing fills."""
        if bool(prompts.slots.any()) and not any(isinstance(each, SoftPrefix) for each in interventions):
            raise MechsteerError(
                f"The prompts reserve {int(prompts.slots.sum(1).max())} slots that nothing fills. Fill them with "
                "prompts.with_prefix(ids), or pass a SoftPrefix."
            )

    # ---- other weights ----

    def unembedding(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding matrix W_U."""
        return unembedding(self.hooked)

    def orthogonalised(self, basis: Float[Tensor, "k d_model"]) -> "Model":
        """A copy whose writing matrices are orthogonal to the rows of `basis`; see `Ablate.to_weights`."""
        return self._with(orthogonalise(self.hooked, basis), "orthogonalised")

    def with_bias(self, layer: int, vector: Float[Tensor, " d_model"]) -> "Model":
        """A copy whose MLP output bias of block `layer` gained `vector`; see `Add.to_weights`."""
        return self._with(add_bias(self.hooked, layer, vector), f"bias at {layer}")

    def with_rank(self, site: SiteLike, reads: Float[Tensor, "k d_in"], writes: Float[Tensor, "k d_model"]) -> "Model":
        """A copy whose block writes `sum_i (x . reads_i) writes_i` more, x the site; see `RankEdit.to_weights`."""
        where = Site.of(site)
        assert where.layer is not None
        edited = add_rank(self.hooked, where.layer, where.kind, reads, writes, head=where.head)
        return self._with(edited, f"rank {len(reads)} at {where}")

    def _with(self, hooked: Any, change: str) -> "Model":
        return Model(hooked, tokenizer=copy.copy(self.tokenizer), name=f"{self.name} ({change})")

    def __getstate__(self) -> dict[str, Any]:
        # The packed pass is made anew from the weights; the hash of many weights takes long, and is known.
        return self.__dict__ | {"_decoder": None, "_id": self.id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        backends.settle(self.hooked)
        self._id = backends.places(self.hooked), state["_id"]

    def __repr__(self) -> str:
        weights = "processed" if self.processed else "unprocessed"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Model({self.name!r}, backend={self.backend!r}, n_layers={self.n_layers}, d_model={self.d_model}, "
            f"d_vocab={self.d_vocab}, {weights} {dtype} weights on {self.device})"
        )

    def _repr_html_(self) -> str:
        cfg, n = self.cfg, sum(weights.numel() for weights in self.hooked.parameters())
        heads = f"{cfg.n_heads} heads of {cfg.d_head}"
        if cfg.n_key_value_heads and cfg.n_key_value_heads != cfg.n_heads:
            heads += f", {cfg.n_key_value_heads} of keys and values"
        weights = "folded or centred" if self.processed else "as they are, nothing folded or centred"
        rows = {
            "shape": f"{self.n_layers} layers, d_model {self.d_model}, d_mlp {cfg.d_mlp}, {heads}",
            "tokens": f"{self.d_vocab} ids, context of {self.n_ctx}",
            "weights": f"{n:,} {str(self.dtype).removeprefix('torch.')} on {self.device}; {weights}",
            "hash": markup.code(self.id.hash[:12]) if self._id or n <= _SMALL else markup.faded("see model.id"),
            "runs in": f"{type(self.hooked).__name__} ({cfg.original_architecture or 'unknown architecture'})",
            "sites": markup.details(f"{len(self.sites.kinds)} kinds", markup.code(", ".join(self.sites.kinds))),
        }
        return markup.card("Model", markup.facts(rows), about=self.name)


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    backend: str = "hooked_transformer",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    n_devices: int = 1,
) -> Model:
    """Load a model with unprocessed weights, and check that its logits are those of transformers.

    Args:
        name_or_path: "pocket" or "pocket-1l", which ship with mechsteer; a Hugging Face folder with `config.json`,
            safetensors weights and a tokenizer; or a hub name that TransformerLens knows, such as "gpt2", which is
            downloaded unless it is in the local cache. Code from a folder or from the hub is never run.
        backend: "hooked_transformer", or "bridge" for a `TransformerBridge` with the same hook names, which runs
            transformers' own code and so covers more architectures.
        device: None means CUDA where there is one, else the CPU.
        dtype: of the weights. The check of the logits is made in fp32 and fp64.
        n_devices: CUDA devices to spread the blocks over, for a model that one cannot hold: `device` and those that
            follow it. Sweeps, generation and recordings run there as on one. Tested with devices that are made up,
            not on real ones.

    Raises:
        ModelLoadError: with one line that says what is wrong with the name, folder or backend, and what to do.
        MechsteerError: a shipped model is missing from this copy of mechsteer.
    """
    backends.check_backend(backend)
    folder, name = _resolve(name_or_path)
    size = memory.of_folder(folder, dtype)
    if size is not None:
        # transformers' model, and that of the backend, which a bridge shares.
        need = memory.Memory({"weights": size} | ({} if backend == "bridge" else {"transformers' copy": size}))
        need.announce(f"Loading {name}")
        need.check(f"Loading {name}", [torch.device("cpu")], "Pass dtype=torch.bfloat16, or a smaller model.")
    loaded = backends.load_folder(folder, backend=backend, device=device, dtype=dtype, n_devices=n_devices)
    return Model(loaded.hooked, tokenizer=loaded.tokenizer, name=name)


def _resolve(name_or_path: str | os.PathLike[str]) -> tuple[Path, str]:
    """The folder that a name or path stands for, and what to call the model: a folder's own name, not its path."""
    name = os.fspath(name_or_path)
    if not name.strip():
        raise ModelLoadError(
            "load_model got an empty name. Pass 'pocket', a model folder, or a hub name such as 'gpt2'."
        )
    if name in SHIPPED_MODELS:
        return data_path("models", name), name
    path = Path(name).expanduser()
    # "org/name" can be either, so it is a folder only if it exists; these can be nothing but paths.
    path_like = not isinstance(name_or_path, str) or name.startswith((".", "~", os.sep)) or path.is_absolute()
    if path_like or path.exists() or name.count("/") > 1 or "\\" in name:
        return path, path.resolve().name
    return backends.hub_folder(name, shipped=SHIPPED_MODELS), name


def _read(prompts: Prompts, logits: str | Bool[Tensor, "..."]) -> Bool[Tensor, "batch pos"]:
    """Mask of the tokens whose logits are wanted."""
    if isinstance(logits, Tensor):
        check_where(logits, prompts)
        return logits.to(prompts.mask.device)
    if logits == "all":
        return prompts.mask
    if logits == "none":
        return torch.zeros_like(prompts.mask)
    if logits == "last":
        return prompts.at(prompts.decision)
    raise MechsteerError(f"logits={logits!r} is not understood. Pass 'all', 'last', 'none' or a mask [batch, pos].")


def _relaid(mask: Bool[Tensor, "batch pos"], source: Prompts, target: Prompts) -> Bool[Tensor, "batch new_pos"]:
    """A mask [batch, pos] in the layout of the same prompts with other padding."""
    if source is target or source.padding_side == target.padding_side:
        return mask[:, : target.mask.shape[1]]
    return torch.zeros_like(target.mask).masked_scatter(target.mask, mask[source.mask])
