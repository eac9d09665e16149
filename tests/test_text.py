"""Word embeddings: frozen, independent of the vocabulary, and strict about prompts."""

from __future__ import annotations

import pytest
import torch

from causvid.errors import UserError
from causvid.models.text import Words

WORDS = ("a", "red", "blue", "circle", "moves", "left")


def test_each_word_has_its_vector_and_the_rest_is_zero():
    text = Words(WORDS, dim=16, length=8).encode(["a red circle", "circle red", ""]).embeddings
    assert text.shape == (3, 8, 16)
    assert torch.equal(text[0, 1], text[1, 1]) and torch.equal(text[0, 2], text[1, 0])
    assert text[0, :3].abs().amin(1).min() > 0
    assert text[0, 3:].abs().max() == 0 and text[1, 2:].abs().max() == 0
    assert text[2].abs().max() == 0  # the unconditional prompt


def test_vectors_do_not_depend_on_the_vocabulary():
    few, many = Words(["red"], dim=16), Words(["green", *WORDS], dim=16)
    assert torch.equal(few.encode(["red"]).embeddings, many.encode(["red"]).embeddings)


def test_vectors_are_standard_normal_and_differ():
    vocabulary = [f"word{i}" for i in range(60)]
    vectors = Words(vocabulary, dim=64, length=60).encode([" ".join(vocabulary)]).embeddings[0]
    assert vectors.mean().abs() < 0.07 and vectors.std().item() == pytest.approx(1, abs=0.05)
    cosines = torch.nn.functional.normalize(vectors, dim=1) @ torch.nn.functional.normalize(vectors, dim=1).T
    assert (cosines - torch.eye(60)).abs().max() < 0.6


def test_case_and_spaces_do_not_matter():
    encoder = Words(WORDS)
    assert torch.equal(encoder.encode(["A  Red circle "]).embeddings, encoder.encode(["a red circle"]).embeddings)


def test_an_unknown_word_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match=r"word 'crcle' \(did you mean 'circle'\?\); accepted words: a, red, blue"):
        Words(WORDS).encode(["a red circle", "a red crcle"])


def test_a_prompt_that_is_too_long_is_refused():
    with pytest.raises(UserError, match="has 4 words; this text encoder takes 3"):
        Words(WORDS, length=3).encode(["a red circle moves"])
