"""Set up before anything imports mechsteer: no network, typed shapes checked, one thread for tiny matrices."""

import os
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any
from weakref import WeakSet

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

install_import_hook("mechsteer", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))  # `import zoo` from every folder of tests

import zoo  # noqa: E402

from mechsteer.model import Model, load_model  # noqa: E402

# The zoo's matrices are so small that handing them to more threads costs more than it saves.
torch.set_num_threads(1)

# A file runs in one process. These take minutes, so they start first: one that starts last keeps all others waiting.
LONGEST = ("test_cli", "test_cli_steering", "test_prefix_cli", "test_chapter_strength", "test_corpus")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def zoo_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each architecture's tiny model. Read only: copy one before changing it."""
    root = tmp_path_factory.mktemp("zoo")
    return {name: zoo.write_folder(name, root / name) for name in (*zoo.ARCHITECTURES, *zoo.PARTLY_ROTARY)}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The pocket model's tokenizer, trained anew from the grammar."""
    from mechsteer.pocket.tokenizer import train_tokenizer

    return train_tokenizer()


@pytest.fixture(params=zoo.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def zoo_folder(architecture: str, zoo_folders: dict[str, Path]) -> Path:
    """Folder of one tiny model; the test runs once for each architecture."""
    return zoo_folders[architecture]


@pytest.fixture(scope="session")
def zoo_models(zoo_folders: dict[str, Path]) -> Callable[..., Model]:
    """`zoo_models(architecture, backend="hooked_transformer")`: each loaded once. Leave them as they are."""
    loaded: dict[tuple[str, str], Model] = {}

    def get(architecture: str, backend: str = "hooked_transformer") -> Model:
        key = architecture, backend
        if key not in loaded:
            loaded[key] = load_model(zoo_folders[architecture], backend=backend, device="cpu")
        return loaded[key]

    return get


@pytest.fixture(scope="session")
def precise(zoo_folders: dict[str, Path]) -> Callable[..., Model]:
    """`precise(architecture, backend="hooked_transformer")`: a tiny model in fp64, in which finite differences are
    sharp. Leave them as they are."""
    loaded: dict[tuple[str, str], Model] = {}

    def get(architecture: str, backend: str = "hooked_transformer") -> Model:
        key = architecture, backend
        if key not in loaded:
            loaded[key] = load_model(zoo_folders[architecture], backend=backend, dtype=torch.float64)
        return loaded[key]

    return get


@pytest.fixture(autouse=True)
def _no_hook_survives(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every test, the hooked models that it made or ran have no hooks left."""
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
