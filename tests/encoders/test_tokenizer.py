import pickle

import pytest

from opt_jax.encoders import tokenizer as module
from opt_jax.encoders.tokenizer import TokenizerError, load_tokenizer, train_tokenizer

CAPTIONS = [
    "A small red square is left of a large blue circle.",
    "There is a green triangle above the yellow star.",
    "A purple circle, a red star and a small blue square.",
] * 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS, 300, path)
    return path


def test_special_tokens_come_first(directory):
    tokenizer = load_tokenizer(directory)
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert ids == (0, 1, 2, 3, 4)
    lines = (directory / "vocab.txt").read_text().splitlines()
    assert lines[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(lines) == len(set(lines)) == tokenizer.vocab_size <= 300


def test_captions_survive_the_round_trip(directory):
    tokenizer = load_tokenizer(directory)
    for caption in CAPTIONS[:3]:
        ids = tokenizer.encode(caption)
        assert ids[0] == tokenizer.cls_id and ids[-1] == tokenizer.sep_id and tokenizer.unk_id not in ids
        assert tokenizer.decode(ids) == caption.lower()


def test_case_and_accents_do_not_matter(directory):
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("A RED  squáre") == tokenizer.encode("a red square")


def test_unseen_words_and_letters(directory):
    tokenizer = load_tokenizer(directory)
    assert tokenizer.unk_id not in tokenizer.encode("z 7 ?")
    assert tokenizer.encode("red Ω star")[2:-2] == [tokenizer.unk_id]
    spelled = tokenizer.encode("quixotic99")
    assert tokenizer.unk_id not in spelled and tokenizer.decode(spelled) == "quixotic99"
    assert tokenizer.encode("") == [tokenizer.cls_id, tokenizer.sep_id]


def test_a_bare_vocabulary_gives_the_same_ids(directory, tmp_path):
    (tmp_path / "vocab.txt").write_bytes((directory / "vocab.txt").read_bytes())
    for path in (tmp_path, tmp_path / "vocab.txt"):
        assert load_tokenizer(path).encode(CAPTIONS[0]) == load_tokenizer(directory).encode(CAPTIONS[0])


def test_same_text_same_tokenizer_and_pickling(directory, tmp_path):
    first = load_tokenizer(directory)
    again = train_tokenizer(CAPTIONS, 300, tmp_path)
    assert again.digest() == first.digest()
    assert pickle.loads(pickle.dumps(first)).encode(CAPTIONS[1]) == first.encode(CAPTIONS[1])
    assert train_tokenizer(CAPTIONS[:1], 300, tmp_path / "other").digest() != first.digest()


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    def unreachable(name):
        raise OSError("no route to host")

    monkeypatch.setattr(module.tokenizers.Tokenizer, "from_pretrained", unreachable)
    with pytest.raises(TokenizerError, match="(?s)bert-base-uncased.*no route to host.*vocab.txt"):
        load_tokenizer("bert-base-uncased")
    with pytest.raises(TokenizerError, match="neither tokenizer.json nor vocab.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    with pytest.raises(TokenizerError, match=r"vocab.txt.*no \[MASK\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="no caption"):
        train_tokenizer([None, ""], 100, tmp_path)
