"""The checks that the other tests run under find mistakes, with axes and without."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import checked
import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from torch import Tensor

import mechsteer as ms

MISTAKE = (BeartypeCallHintViolation, jaxtyping.TypeCheckError)
check = checked.jaxtyped(typechecker=beartype)


@check
def plain(x: int, *, y: list[str] | None = None) -> str:
    return "one" if x == 1 else x  # type: ignore[return-value]


@check
def paired(a: Float[Tensor, "batch d"], b: list[Float[Tensor, " d"]]) -> Float[Tensor, "batch d"]:
    return a + b[0] if len(b) == 1 else a[0]


@check
@dataclass
class Held:
    x: int


@check
@dataclass
class HeldRow:
    x: Float[Tensor, " n"]
    y: Float[Tensor, " n"]


def test_arguments_and_results() -> None:
    assert plain(1, y=["a"]) == "one"
    for call in (lambda: plain("a"), lambda: plain(1, y="a"), lambda: plain(1, y=[2]), lambda: plain(2)):
        with pytest.raises(MISTAKE):
            call()
    assert Held(1).x == 1
    with pytest.raises(MISTAKE):
        Held("a")


def test_axes_agree_with_one_another() -> None:
    assert paired(torch.zeros(2, 3), [torch.ones(3)]).shape == (2, 3)
    wrong: tuple[Callable[[], Any], ...] = (
        lambda: paired(torch.zeros(2, 3), [torch.ones(4)]),
        lambda: paired(torch.zeros(2, 3), [torch.ones(3), torch.ones(3)]),  # gives one row
        lambda: HeldRow(torch.ones(3), torch.ones(4)),
    )
    for call in wrong:
        with pytest.raises(MISTAKE):
            call()


@pytest.mark.parametrize(
    "annotation, expected",
    [
        (int, False), (int | None, False), (Callable[[int], str], False), (dict[str, list[Tensor]], False),
        (Float[Tensor, "a"], True), (Float[Tensor, "a"] | None, True), (list[Float[Tensor, "a"]], True),
        (Callable[[Float[Tensor, "a"]], int], True), (dict[str, tuple[int, Float[Tensor, "a"]]], True),
        ("Model", True), (list["Model"], True),
    ],
)  # fmt: skip
def test_which_annotations_name_axes(annotation: Any, expected: bool) -> None:
    assert checked.names_axes(annotation) is expected


def test_the_library_is_checked_until_that_is_switched_off() -> None:
    with pytest.raises(MISTAKE):
        ms.Prompts.from_ids(3)  # type: ignore[arg-type]
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert plain(2) == 2
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
