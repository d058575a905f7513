"""How a token is chosen from logits, and how it is shown."""

from __future__ import annotations

import pytest
import torch

from mcore_lab.errors import NotFiniteError
from mcore_lab.sample.choice import Choice
from mcore_lab.sample.vocabulary import Speech, Vocabulary

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
BYTES = Vocabulary(size=256, end_of_document=0, is_text=True)


def frequencies(choice: Choice, draws: int = 4000) -> torch.Tensor:
    draw = torch.Generator().manual_seed(choice.seed)
    tokens = [choice.token(PROBABILITIES.log(), draw) for _ in range(draws)]
    return torch.bincount(torch.tensor(tokens), minlength=5) / draws


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(), [0.1, 0.4, 0.05, 0.25, 0.2]),
        (Choice(temperature=0), [0, 1, 0, 0, 0]),
        (Choice(temperature=0.5), [0.0370, 0.5926, 0.0093, 0.2315, 0.1481]),
        (Choice(top_k=1), [0, 1, 0, 0, 0]),
        (Choice(top_k=3), [0, 0.4706, 0, 0.2941, 0.2353]),
        (Choice(top_p=0.1), [0, 1, 0, 0, 0]),
        (Choice(top_p=0.6), [0, 0.6154, 0, 0.3846, 0]),
        (Choice(top_k=4, top_p=0.7), [0, 0.4706, 0, 0.2941, 0.2353]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(choice: Choice, expected: list[float]) -> None:
    """To 0.025: three standard deviations of 4,000 draws."""
    found = frequencies(choice)
    assert found.tolist() == pytest.approx(expected, abs=0.025)
    assert ((found == 0) == (torch.tensor(expected) == 0)).all()


def test_rounding_of_the_logits_changes_no_draw() -> None:
    noise = torch.Generator().manual_seed(1)
    for seed in range(200):
        logits = torch.randn(300, generator=noise)
        rounded = logits + 1e-6 * torch.randn(300, generator=noise)
        choice = Choice(temperature=2, top_k=40, top_p=0.9)
        one, other = (
            choice.token(each, torch.Generator().manual_seed(seed)) for each in (logits, rounded)
        )
        assert one == other


def test_spoilt_logits_are_told() -> None:
    with pytest.raises(NotFiniteError, match="not finite"):
        Choice().token(torch.tensor([0.0, torch.nan]), torch.Generator())


def test_a_character_is_shown_once_it_is_whole_and_none_commands_the_terminal() -> None:
    speech = Speech(BYTES)
    assert [speech.of([byte]) for byte in "aé".encode()] == ["a", "", "é"]
    assert speech.of([0xC3], ends=True) == "\ufffd"
    assert BYTES.spoken(b"a\x1b[31m\tb\n") == "a\ufffd[31m\tb\n"
    numbers = Vocabulary(size=9, end_of_document=8, is_text=False)
    assert numbers.spoken([1, 2, 3]) == "1,2,3"
    speech = Speech(numbers)
    assert [speech.of([1, 2]), speech.of([3]), speech.of([])] == ["1,2", ",3", ""]
