"""WordPiece tokens: a vocabulary of one's own, or BERT's.

Text is normalised as BERT's uncased models do (lower case, no accents, no control characters, words and
punctuation apart), so that a vocabulary trained here and a published one are used in the same way.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-"
SMALLEST = len(SPECIAL_TOKENS) + 2 * len(_LETTERS)
"""Tokens of a vocabulary without a single word: each letter at the start of a word, and within one."""


class TokenizerError(ValueError):
    """A tokenizer cannot be trained, or cannot be found or read."""


@dataclass(frozen=True)
class Tokenizer:
    """A WordPiece tokenizer with BERT's special tokens; it can be pickled.

    `pad_id`, `unk_id`, `cls_id`, `sep_id`, `mask_id` are the ids of the special tokens: 0 to 4 in
    vocabularies trained here; 0, 100, 101, 102, 103 in BERT's published one.
    """

    model: tokenizers.Tokenizer
    vocab_size: int
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int

    def encode(self, text: str) -> list[int]:
        """The ids of [CLS], the word pieces, [SEP]; a word that no pieces spell becomes one [UNK]."""
        return self.model.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The normalised text of `ids`; special tokens are left out."""
        return self.model.decode([int(i) for i in ids], skip_special_tokens=True)

    def digest(self) -> str:
        """SHA-256 (hex) of the vocabulary and the rules: equal exactly for equal tokenizers."""
        return hashlib.sha256(self.model.to_str().encode()).hexdigest()


def train_tokenizer(captions: Iterable[str], vocab_size: int, directory) -> Tokenizer:
    """Learns WordPiece from `captions` and writes `tokenizer.json` and `vocab.txt` to `directory`.

    Args:
        captions: sentences; None and empty ones are passed over.
        vocab_size: the most tokens to have, specials included; small texts give fewer.
        directory: where to write, made if absent.

    Returns:
        the tokenizer, as `load_tokenizer(directory)` would give it.

    Raises:
        TokenizerError: there is no text, or `vocab_size` cannot hold its letters.
    """
    texts = [text for text in captions if text]
    if not texts:
        raise TokenizerError("no caption holds any text: a tokenizer cannot be trained")
    learner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    _use_bert_rules(learner)
    seen = {letter for text in texts for letter in learner.normalizer.normalize_str(text)}
    letters = sorted(letter for letter in seen | set(_LETTERS) if not letter.isspace())
    # The trainer numbers '##x' in the order of a seeded hash, which also decides between equally frequent
    # merges. Given as "special", the letters have fixed numbers, and any word of them can be spelled.
    fixed = [*SPECIAL_TOKENS, *letters, *("##" + letter for letter in letters)]
    if len(fixed) > vocab_size:
        raise TokenizerError(
            f"vocab_size {vocab_size} cannot hold {len(fixed)} specials and letters; raise"
            " config.encoders.tokenizer.vocab_size"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=fixed, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    vocabulary = learner.get_vocab()
    model = _from_vocabulary(vocabulary, "the vocabulary trained on the captions")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    by_id = sorted(vocabulary, key=vocabulary.get)
    _write(directory / "vocab.txt", "\n".join(by_id) + "\n")
    _write(directory / "tokenizer.json", model.to_str(pretty=True))
    return load_tokenizer(directory)


def load_tokenizer(directory_or_name) -> Tokenizer:
    """Reads a tokenizer from disk or, by its name, from the Hugging Face hub (or its local cache).

    Args:
        directory_or_name: a directory with `tokenizer.json` or `vocab.txt`, one of these files, or a name as
            'bert-base-uncased'. A bare `vocab.txt` is read with the uncased rules.

    Raises:
        TokenizerError: nothing is there, the hub cannot be reached, or a special token is missing.
    """
    path = Path(directory_or_name)
    if path.is_dir():
        path = next((path / n for n in ("tokenizer.json", "vocab.txt") if (path / n).is_file()), path)
        if path.is_dir():
            raise TokenizerError(f"{path} holds neither tokenizer.json nor vocab.txt")
    if path.is_file():
        return _wrap(_read(path), str(path))
    return _wrap(_from_hub(str(directory_or_name)), str(directory_or_name))


def _read(path: Path) -> tokenizers.Tokenizer:
    if path.name.endswith(".txt"):
        try:
            tokens = path.read_text("utf-8").rstrip("\n").split("\n")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is no vocabulary, a text with a token a line: {error}") from error
        return _from_vocabulary({token: i for i, token in enumerate(tokens)}, str(path))
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} is no tokenizer file: {error}") from error


def _from_hub(name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:  # whatever the hub client raises, without a network or for an unknown name
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise TokenizerError(
            f"tokenizer {name!r} is no file or directory here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {reason}). Without a network, copy the model's vocab.txt or "
            "tokenizer.json into a directory and give that directory's path instead of the name."
        ) from error


def _from_vocabulary(vocabulary: dict[str, int], origin: str) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    _use_bert_rules(model)
    ids = {token: _special_id(model, token, origin) for token in SPECIAL_TOKENS}
    model.add_special_tokens(list(SPECIAL_TOKENS))
    model.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return model


def _use_bert_rules(model: tokenizers.Tokenizer) -> None:
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece(prefix="##")


def _special_id(model: tokenizers.Tokenizer, token: str, origin: str) -> int:
    found = model.token_to_id(token)
    if found is None:
        raise TokenizerError(f"{origin}: the vocabulary has no {token}; it must hold {SPECIAL_TOKENS}")
    return found


def _wrap(model: tokenizers.Tokenizer, origin: str) -> Tokenizer:
    # Published files may carry a truncation or padding of their own; lengths are the batch's matter.
    model.no_truncation()
    model.no_padding()
    ids = [_special_id(model, token, origin) for token in SPECIAL_TOKENS]
    return Tokenizer(model, model.get_vocab_size(), *ids)


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
