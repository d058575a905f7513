"""Between what a person writes and reads and a model's tokens. No torch in here."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from mcore_lab.config import Data
from mcore_lab.errors import ConfigError

_BYTES = 256
_END_OF_TEXT = 0


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens of a run's data: bytes of UTF-8 where it is text, else numbers."""

    size: int
    """The tokens are 0 to this number, which is none."""
    end_of_document: int | None
    """The token that ends a document; None where the data has no documents."""
    is_text: bool

    @classmethod
    def of(cls, data: Data, vocab_size: int | None = None) -> Vocabulary:
        """Return the vocabulary of the tokenizer that `data` is read with.

        Without text, `vocab_size` goes before it: that of a model that was imported, whose tokens
        are not of this data.
        """
        if data.path is not None:
            return cls(size=_BYTES, end_of_document=_END_OF_TEXT, is_text=True)
        if vocab_size is not None:
            return cls(size=vocab_size, end_of_document=None, is_text=False)
        last = data.mock_vocab_size
        return cls(size=last + 1, end_of_document=last, is_text=False)

    def tokens_of_text(self, text: str) -> list[int]:
        """Return the tokens of a text; of an empty one the token after which a document begins.

        Raises ConfigError where the data is no text.
        """
        if not self.is_text:
            raise ConfigError(
                "--prompt: the run's data is no text, but tokens from 0 to "
                f"{self.size - 1}: --tokens 1,2,3"
            )
        return list(text.encode("utf-8", "surrogateescape")) or [_END_OF_TEXT]

    def tokens_of_numbers(self, words: str) -> list[int]:
        """Return the tokens of `1,2,3`. Raises ConfigError for what is no token."""
        try:
            tokens = [int(word) for word in words.split(",")]
        except ValueError:
            raise ConfigError(
                f"--tokens expects whole numbers with commas, like 1,2,3; got {words or 'nothing'}"
            ) from None
        for token in tokens:
            if not 0 <= token < self.size:
                raise ConfigError(
                    f"--tokens {words}: {token} is no token of the run's data, which has 0 to "
                    f"{self.size - 1}"
                )
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        """Return tokens as a text; what is not UTF-8 becomes U+FFFD."""
        return bytes(tokens).decode("utf-8", "replace")

    def spoken(self, tokens: Sequence[int]) -> str:
        """Return tokens as a person reads them."""
        return Speech(self).of(tokens, ends=True)


class Speech:
    """Tokens as a person reads them, one at a time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._is_text = vocabulary.is_text
        self._is_first = True
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, tokens: Sequence[int], *, ends: bool = False) -> str:
        """Return what to print for the next tokens; bytes of a character wait for its last."""
        if not self._is_text:
            words = "".join(f",{token}" for token in tokens)
            words, self._is_first = words[self._is_first :], self._is_first and not tokens
            return words
        return "".join(map(_harmless, self._decoder.decode(bytes(tokens), final=ends)))


def _harmless(character: str) -> str:
    """Keep what a model makes up from commanding the terminal."""
    return character if character.isprintable() or character in "\n\t" else "\ufffd"
