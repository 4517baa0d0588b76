"""The only rooms that import transformer_lens, sae_lens or transformers.

Importing `mechsteer.backends` imports none of them: each backend is imported when it is first used.
"""

import gc
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsteer.errors import ModelLoadError
from mechsteer.precision import wide

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    Hooked = HookedTransformer | TransformerBridge
else:
    # Naming the real classes here would import TransformerLens, which takes seconds.
    Hooked = Any

# Settings that say where a model is, what it is called or what its hooks show, not what it computes.
_NOT_COMPUTED_WITH = """device n_devices seed init_mode init_weights initializer_range model_name tokenizer_name
default_prepend_bos tokenizer_prepends_bos trust_remote_code _name_or_path transformers_version use_attn_result
use_split_qkv_input use_hook_mlp_in use_attn_in use_hook_tokens use_cache ungroup_grouped_query_attention
checkpoint_index checkpoint_label_type checkpoint_value"""

BACKENDS = ("hooked_transformer", "bridge")


class Loaded(NamedTuple):
    """A hooked model and the tokenizer of its folder, as transformers loads it (untouched by TransformerLens)."""

    hooked: Hooked
    tokenizer: Any


def check_backend(backend: str) -> None:
    """Raise `ModelLoadError` unless `backend` is one that exists."""
    if backend not in BACKENDS:
        raise ModelLoadError(f"backend={backend!r} does not exist. Pass one of {', '.join(map(repr, BACKENDS))}.")


def backend_of(hooked: object) -> str | None:
    """Which backend a hooked model belongs to, or None for an object that is no hooked model."""
    # By name, because an isinstance check would have to import TransformerLens for an object that may not need it.
    names = {cls.__name__ for cls in type(hooked).__mro__}
    if "HookedTransformer" in names:
        return "hooked_transformer"
    if "TransformerBridge" in names:
        return "bridge"
    return None


def is_processed(hooked: Any) -> bool:
    """Whether weights were folded or centred after loading, so that activations differ from Hugging Face's."""
    if backend_of(hooked) == "bridge":
        from mechsteer.backends.bridge import is_processed as check
    else:
        from mechsteer.backends.hooked_transformer import is_processed as check
    return check(hooked)


@contextmanager
def hooks(hooked: Any, fwd_hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
    """Attach hooks, and remove these and no others, whatever happens."""
    points: list[tuple[Any, Any]] = []
    found = hooked.hook_dict if fwd_hooks else {}
    try:
        for name, hook in fwd_hooks:
            point = found[name]
            point.add_hook(hook)
            points.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in points:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


def is_hooked(hooked: Any) -> bool:
    """Whether someone's own hooks are attached, which only a forward pass of the hooked model obeys."""
    return any(point.fwd_hooks for point in hooked.hook_dict.values())


def hears(hooked: Any, hook_name: str) -> bool:
    """Whether what a hook at this hook point returns is used; True where it is never run.

    Attention kernels that a bridge leaves to transformers show their scores and pattern, and may go on with their own.
    """
    tokens = torch.arange(min(4, hooked.cfg.d_vocab), device=next(hooked.parameters()).device)[None]
    fired: list[bool] = []

    def changed(tensor: Tensor, hook: Any) -> Tensor:
        fired.append(True)
        return 2 * tensor + 1

    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        before = logits_at(hooked, tokens, everywhere, stop=None)
        with hooks(hooked, [(hook_name, changed)]):
            after = logits_at(hooked, tokens, everywhere, stop=None)
    return not fired or not torch.equal(before, after)


def logits_at(
    hooked: Any, tokens: Int[Tensor, "batch pos"], read: Bool[Tensor, "batch pos"], *, stop: int | None
) -> Float[Tensor, "row d_vocab"]:
    """Run right-padded tokens and give the logits of the tokens in `read`.

    Args:
        stop: run only the layers before this one, and give no logits; None for all.
    """
    # Real tokens never see padding on their right. The mask says so to code that would guess padding from token ids.
    everything = torch.ones_like(tokens)
    # A bridge runs all layers: transformers owns its loop over them.
    some = {} if stop is None or backend_of(hooked) == "bridge" else {"stop_at_layer": stop}
    out = hooked(tokens, attention_mask=everything, **some)
    if stop is not None:
        return torch.empty(0, hooked.cfg.d_vocab, device=tokens.device)
    return out[read.to(out.device)].to(tokens.device)


def places(hooked: Any) -> tuple[Any, ...]:
    """Changes whenever a weight is replaced, moved, or edited in place by an operation that PyTorch counts."""
    return _places(hooked.parameters())


def _places(parameters: Iterable[Tensor]) -> tuple[Any, ...]:
    return tuple((p.data_ptr(), p._version, p.device, p.dtype) for p in parameters)


def settle(hooked: Any) -> None:
    """Let a model that came from another process run where its weights arrived.

    TransformerLens goes by its config, which names devices of the other process; blocks on several are put on them in
    its order.
    """
    found = sorted({each.device for each in hooked.parameters()}, key=lambda device: device.index or 0)
    if len(found) == 1:
        hooked.cfg.device, hooked.cfg.n_devices = str(found[0]), 1
    elif backend_of(hooked) == "hooked_transformer":
        from mechsteer.backends.hooked_transformer import spread

        spread(hooked, found[0], len(found))


def fingerprint(hooked: Any) -> tuple[Any, ...]:
    """Changes whenever a weight does, also where it was edited through `.data`; reads all weights once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    everything = list(hooked.parameters())
    for parameter in everything:
        by_device.setdefault(parameter.device, []).append(parameter)
    values: list[float] = []
    for parameters in by_device.values():
        with torch.no_grad():
            # One call for all of them: as fast as memory is read. In fp32, because a norm in half precision has three
            # digits, and most edits would not show.
            options = {} if all(wide(each.dtype) == each.dtype for each in parameters) else {"dtype": torch.float32}
            norms = torch._foreach_norm(parameters, **options)  # pyright: ignore
            values += torch.stack([norm.float() for norm in norms]).tolist()
    return (*values, _places(everything))


def weights_hash(hooked: Any) -> str:
    """SHA-256 of the settings that matter for what is computed, and of names, shapes and values of all parameters.

    A bridge's are those that a `HookedTransformer` of the same weights has, where there can be one: what was made with
    one of the two goes to the other.
    """
    config, parameters = hooked.cfg, hooked.named_parameters()
    if backend_of(hooked) == "bridge":
        from mechsteer.backends.bridge import classic_weights

        config, parameters = classic_weights(hooked) or (hooked.original_model.config, parameters)
    skipped = set(_NOT_COMPUTED_WITH.split())
    settings = {key: str(value) for key, value in config.to_dict().items() if key not in skipped}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, parameter in parameters:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def build_decoder(hooked: Any) -> Any:
    """The packed forward pass of a hooked model, or None where that does not cover it.

    Its logits are compared with the hooked model's own, so that a setting that it overlooks is never used unseen.
    """
    from mechsteer.backends.decoder import Decoder

    twin = hooked
    if backend_of(hooked) == "bridge":
        from mechsteer.backends.bridge import hooked_twin

        twin = hooked_twin(hooked)
    built = None if twin is None else Decoder.of(twin)
    if built is None:
        return None
    n_pos = min(hooked.cfg.n_ctx, 24)
    tokens = torch.randint(hooked.cfg.d_vocab, (1, n_pos), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(built.W_E.device)
    with torch.no_grad():
        expected = hooked(tokens, attention_mask=torch.ones_like(tokens))[0]
        got = built.whole(tokens)[0]
    tolerance = (1e-4 if wide(got.dtype) == got.dtype else 5e-2) * max(1.0, float(expected.abs().max()))
    worst = float((got.to(expected.device) - expected).abs().max())
    if not worst <= tolerance:
        warnings.warn(
            f"mechsteer's packed forward pass differs by {worst:.2g} from that of {hooked.cfg.model_name} and is not "
            "used: sweeps and generation are slower.",
            stacklevel=2,
        )
        return None
    return built


def hub_folder(name: str, *, shipped: tuple[str, ...] = ()) -> Path:
    """Local snapshot of a hub model that TransformerLens knows; see `mechsteer.backends.huggingface.hub_folder`."""
    _import_transformer_lens()
    from mechsteer.backends import huggingface

    return huggingface.hub_folder(name, shipped=shipped)


def hub_config(name: str) -> dict[str, Any]:
    """The config of a hub model; see `mechsteer.backends.huggingface.hub_config`."""
    from mechsteer.backends import huggingface

    return huggingface.hub_config(name)


def load_folder(
    folder: Path, *, backend: str, device: str | torch.device | None, dtype: torch.dtype, n_devices: int = 1
) -> Loaded:
    """Load a Hugging Face folder with unprocessed weights, and check its logits against transformers' own.

    Args:
        folder: holds `config.json`, safetensors weights and a tokenizer. Nothing else is read, nothing is downloaded.
        backend: one of `BACKENDS`.
        device: None means CUDA where there is one, else the CPU.
        dtype: of the weights.
        n_devices: CUDA devices to spread the blocks over; see `mechsteer.backends.hooked_transformer.spread`.

    Raises:
        ModelLoadError: the folder is incomplete or damaged, the backend cannot compute this model exactly, or there are
            fewer devices.
    """
    check_backend(backend)
    _import_transformer_lens()
    from mechsteer.backends import huggingface

    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    _check_devices(n_devices, target, backend)
    source = huggingface.read_folder(folder, dtype=dtype)
    tokens = huggingface.probe_tokens(source.model.config)
    expected = huggingface.logits(source.model, tokens)
    if backend == "bridge":
        from mechsteer.backends.bridge import from_huggingface
    else:
        from mechsteer.backends.hooked_transformer import from_huggingface
    several = {} if n_devices == 1 else {"n_devices": n_devices}
    hooked = from_huggingface(source, device=target, dtype=dtype, **several)
    with torch.no_grad():
        got = hooked(tokens.to(target))
    huggingface.check_logits(folder, backend=backend, got=got, expected=expected)
    return Loaded(hooked, source.tokenizer)


def _check_devices(n_devices: int, device: torch.device, backend: str) -> None:
    if n_devices == 1:
        return
    if n_devices < 1:
        raise ModelLoadError(f"n_devices={n_devices} is no number of devices. Pass 1 or more.")
    if backend == "bridge":
        raise ModelLoadError(
            f"n_devices={n_devices} goes with backend='hooked_transformer'. transformers spreads a bridge: load it "
            f"with TransformerBridge.boot_transformers(name, n_devices={n_devices}) and pass it to Model."
        )
    first = device.index or 0
    if device.type != "cuda" or first + n_devices > torch.cuda.device_count():
        raise ModelLoadError(
            f"n_devices={n_devices} from {device} on needs as many CUDA devices, and there are "
            f"{torch.cuda.device_count()}. Pass fewer, or n_devices=1 for {device.type!r}."
        )


def _import_transformer_lens() -> None:
    # The import creates millions of objects that stay, and the garbage collector searches them again and again: a
    # quarter of the import time, 1 s of 4. Nothing needs collecting meanwhile.
    enabled = gc.isenabled()
    gc.disable()
    try:
        import transformer_lens  # noqa: F401
    finally:
        if enabled:
            gc.enable()
