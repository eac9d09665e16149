"""Text encoders: prompts to token embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causvid.errors import UserError
from causvid.randomness import key
from causvid.registry import did_you_mean, register
from causvid.types import Text


@register("text_encoder", "words")
class Words:
    """Frozen random embeddings of the words of a small closed vocabulary; positions after the prompt are zero.

    Each word's vector is a function of the word alone, so adding a word to the vocabulary changes no other. The empty
    prompt is all zeros: the unconditional one.

    Args:
        vocabulary: accepted words.
        dim: width of an embedding.
        length: tokens per prompt.
    """

    def __init__(self, vocabulary: Sequence[str], dim: int = 64, length: int = 8) -> None:
        self.dim, self.length = dim, length
        self._vectors = {word: self._vector(word) for word in vocabulary}

    def _vector(self, word: str) -> Tensor:
        return torch.randn(self.dim, generator=torch.Generator().manual_seed(key("word", word)))

    def encode(self, prompts: Sequence[str]) -> Text:
        """``b l d`` embeddings of the prompts.

        Raises:
            UserError: a word outside the vocabulary, or a prompt that is too long.
        """
        out = torch.zeros(len(prompts), self.length, self.dim)
        for row, prompt in enumerate(prompts):
            words = prompt.lower().split()
            if len(words) > self.length:
                raise UserError(f"prompt '{prompt}' has {len(words)} words; this text encoder takes {self.length}")
            for column, word in enumerate(words):
                if word not in self._vectors:
                    raise UserError(
                        f"prompt '{prompt}': unknown word '{word}'{did_you_mean(word, self._vectors)}; "
                        f"accepted words: {', '.join(self._vectors)}"
                    )
                out[row, column] = self._vectors[word]
        return Text(out)
