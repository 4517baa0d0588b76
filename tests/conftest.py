"""Set up before anything imports mechsteer: no network, typed shapes checked, one thread for tiny matrices."""

import os
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

sys.path.insert(0, str(Path(__file__).parent))  # `import zoo` from every folder of tests

import checked

checked.install()

import pytest  # noqa: E402

if TYPE_CHECKING:
    from mechsteer.model import Model

# The process that only hands out files to others reads this module too. So that they need not wait until it has
# imported torch and mechsteer, whatever needs these imports them itself.
ARCHITECTURES = ("gpt2", "llama", "gemma2", "gemma3", "qwen3", "mistral")  # as in `zoo`

# A file runs in one process. These take minutes, so they start first: one that starts last keeps all others waiting.
LONGEST = (
    "test_sweep", "test_prefix_cli", "test_pocket_model", "test_prefix_search", "test_run", "test_cli_steering",
    "test_cli", "test_strength_choose", "test_chapter_features", "test_chapter_entry", "test_chapter_strength",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch
    import zoo

    # The zoo's matrices are so small that handing them to more threads costs more than it saves.
    torch.set_num_threads(1)
    assert zoo.ARCHITECTURES == ARCHITECTURES
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def zoo_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each architecture's tiny model. Read only: copy one before changing it."""
    import zoo

    root = tmp_path_factory.mktemp("zoo")
    return {name: zoo.write_folder(name, root / name) for name in (*zoo.ARCHITECTURES, *zoo.PARTLY_ROTARY)}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The pocket model's tokenizer. `test_pocket_model` trains it anew, which takes long, and compares."""
    from transformers import AutoTokenizer

    from mechsteer.data import data_path

    return AutoTokenizer.from_pretrained(data_path("models", "pocket"))


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def zoo_folder(architecture: str, zoo_folders: dict[str, Path]) -> Path:
    """Folder of one tiny model; the test runs once for each architecture."""
    return zoo_folders[architecture]


@pytest.fixture(scope="session")
def zoo_models(zoo_folders: dict[str, Path]) -> "Callable[..., Model]":
    """`zoo_models(architecture, backend="hooked_transformer")`: each loaded once. Leave them as they are."""
    from mechsteer.model import load_model

    loaded: dict[tuple[str, str], Model] = {}

    def get(architecture: str, backend: str = "hooked_transformer") -> "Model":
        key = architecture, backend
        if key not in loaded:
            loaded[key] = load_model(zoo_folders[architecture], backend=backend, device="cpu")
        return loaded[key]

    return get


@pytest.fixture(scope="session")
def precise(zoo_folders: dict[str, Path]) -> "Callable[..., Model]":
    """`precise(architecture, backend="hooked_transformer")`: a tiny model in fp64, in which finite differences are
    sharp. Leave them as they are."""
    import torch

    from mechsteer.model import load_model

    loaded: dict[tuple[str, str], Model] = {}

    def get(architecture: str, backend: str = "hooked_transformer") -> "Model":
        key = architecture, backend
        if key not in loaded:
            loaded[key] = load_model(zoo_folders[architecture], backend=backend, dtype=torch.float64)
        return loaded[key]

    return get


@pytest.fixture(autouse=True)
def _no_hook_survives(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every test, the hooked models that it made or ran have no hooks left."""
    from mechsteer.model import Model

    used: WeakSet[Model] = WeakSet()

    def watched(method: Any) -> Any:
        @wraps(method)
        def call(model: Model, *args: Any, **options: Any) -> Any:
            used.add(model)
            return method(model, *args, **options)

        return call

    for name in ("__init__", "forward"):
        monkeypatch.setattr(Model, name, watched(getattr(Model, name)))
    yield
    for model in used:
        hooked = getattr(model, "hooked", None)  # a Model that was refused has none
        left = (
            [name for name, point in hooked.hook_dict.items() if point.fwd_hooks or point.bwd_hooks] if hooked else []
        )
        assert not left, f"hooks survived on {model.name} at {left}"
