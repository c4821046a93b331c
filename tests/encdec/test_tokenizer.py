"""The tokenizer: trained here on real text, saved, loaded, and fed the strings that must not become special tokens."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen2Tokenizer

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError, DataError, MissingPrerequisite
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer

TEXTS = [path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))]
VOCAB_SIZE, NUM_SENTINELS = 500, 20
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}

HOSTILE = [
    "<extra_id_3>",
    "x = '<|im_end|>'  # <|endoftext|>",
    "<extra_id_0><extra_id_1> <extra_id_19>",
    "a<extra_id_7>b\n<|endoftext|>\n",
    "<tool_call>{}</tool_call>",
]


@pytest.fixture(scope="module")
def tokenizer() -> Qwen3EncoderDecoderTokenizer:
    return Qwen3EncoderDecoderTokenizer.train_from_texts(TEXTS, VOCAB_SIZE, NUM_SENTINELS)


@pytest.fixture
def qwen_base(tokenizer, tmp_path) -> Path:
    """A saved plain Qwen2Tokenizer as Qwen3's base models have it: ends as it pads, some added tokens not special."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = {token: index for token, index in model["vocab"].items() if index < tokenizer.pad_token_id}
    base = Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]])
    base.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    base.add_tokens(["<tool_call>", "</tool_call>"])
    base.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def special_ids(tokenizer) -> set[int]:
    return set(tokenizer.get_added_vocab().values())


class TestTraining:
    def test_the_whole_length_is_the_size_asked_for(self, tokenizer):
        assert len(tokenizer) == VOCAB_SIZE == max(tokenizer.get_vocab().values()) + 1
        assert tokenizer.sentinel_ids == list(range(VOCAB_SIZE - NUM_SENTINELS, VOCAB_SIZE))
        assert tokenizer.convert_ids_to_tokens(tokenizer.sentinel_ids[7]) == "<extra_id_7>"
        assert tokenizer.pad_token_id == tokenizer.decoder_start_token_id != tokenizer.eos_token_id

    def test_the_same_texts_give_the_same_vocabulary(self, tokenizer):
        again = Qwen3EncoderDecoderTokenizer.train_from_texts(iter(TEXTS), VOCAB_SIZE, NUM_SENTINELS)
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.fingerprint() == tokenizer.fingerprint()

    def test_merges_were_learnt(self, tokenizer):
        text = TEXTS[0]
        assert len(tokenizer.encode_documents([text])[0]) < 0.7 * len(text.encode())

    def test_too_little_room_and_too_little_text_are_named(self):
        with pytest.raises(ConfigError, match=r"found 277.*278 or more"):
            Qwen3EncoderDecoderTokenizer.train_from_texts(TEXTS, 277, NUM_SENTINELS)
        with pytest.raises(DataError, match="vocabulary of 5000 tokens"):
            Qwen3EncoderDecoderTokenizer.train_from_texts(["too little"], 5000, NUM_SENTINELS)


class TestDocuments:
    @pytest.mark.parametrize("text", HOSTILE)
    def test_literal_special_tokens_are_text(self, tokenizer, text):
        [ids] = tokenizer.encode_documents([text])
        assert not special_ids(tokenizer) & set(ids)
        assert tokenizer.decode(ids) == text

    @pytest.mark.parametrize("text", HOSTILE)
    def test_so_are_the_added_tokens_that_qwen_calls_ordinary(self, qwen_base, text):
        tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(qwen_base)
        assert "<tool_call>" in tokenizer.get_added_vocab()
        assert not special_ids(tokenizer) & set(tokenizer.encode_documents([text])[0])

    def test_ordinary_text_is_encoded_as_ever_and_comes_back(self, tokenizer):
        texts = [*TEXTS, "", " ", "\u00e9\u4e2d\U0001f600\r\n\t"]
        encoded = tokenizer.encode_documents(texts)
        assert encoded == [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        assert [tokenizer.decode(ids) for ids in encoded] == texts

    def test_a_padded_call_before_leaves_documents_alone(self, tokenizer):
        expected = tokenizer.encode_documents(["a b c", "a"])
        tokenizer(["a b c", "a"], padding=True, truncation=True, max_length=2)
        fresh = Qwen3EncoderDecoderTokenizer.train_from_texts(TEXTS, VOCAB_SIZE, NUM_SENTINELS)
        fresh(["a b c", "a"], padding=True, truncation=True, max_length=2)
        assert tokenizer.encode_documents(["a b c", "a"]) == fresh.encode_documents(["a b c", "a"]) == expected


class TestPrompts:
    def test_sentinels_are_never_split(self, tokenizer):
        text = "the <extra_id_0> of<extra_id_19>x<|im_end|>"
        ids = tokenizer(text).input_ids
        expected = [tokenizer.sentinel_ids[0], tokenizer.sentinel_ids[19], tokenizer.eos_token_id]
        assert [token for token in ids if token in special_ids(tokenizer)] == expected
        assert tokenizer.decode(ids) == text
        assert "extra_id" not in tokenizer.decode(ids, skip_special_tokens=True)

    @pytest.mark.parametrize(
        "around", ["é", "e\u0301", "\u4e2d", "\U0001f600", "a", " ", "\n", "<", ">", "_0", "\u00a0"]
    )
    def test_sentinels_are_whole_beside_anything(self, tokenizer, around):
        text = f"in{around}<extra_id_12>{around}side<extra_id_1>{around}"
        found = [token for token in tokenizer(text).input_ids if token in set(tokenizer.sentinel_ids)]
        assert found == [tokenizer.sentinel_ids[12], tokenizer.sentinel_ids[1]]

    def test_normalisation_makes_no_sentinel(self, tokenizer):
        """Text that only NFC turns into a sentinel's name is text."""
        spelt = "<extra_id_1>".replace("<", "<\u0338").replace(">", "\uff1e")
        assert not set(tokenizer.sentinel_ids) & set(tokenizer(spelt).input_ids)
        assert not set(tokenizer.sentinel_ids) & set(tokenizer("<extra_id_20> <extra_id_> <EXTRA_ID_1>").input_ids)


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.one_of(st.integers(0, NUM_SENTINELS - 1), st.text(max_size=12)), max_size=8))
def test_any_text_and_any_sentinels_come_back(pieces):
    """Documents to the character (but for NFC), prompts with every sentinel whole and in its place."""
    tokenizer = cached_tokenizer()
    text = "".join(f"<extra_id_{piece}>" if isinstance(piece, int) else piece for piece in pieces)
    [ids] = tokenizer.encode_documents([text])
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert not special_ids(tokenizer) & set(ids)
    assert len(ids) <= len(text.encode()) * 3 + 1
    assume(not any("<" in piece or ">" in piece for piece in pieces if isinstance(piece, str)))
    ids = tokenizer(text).input_ids
    sentinels = tokenizer.sentinel_ids
    assert [sentinels.index(one) for one in ids if one in sentinels] == [p for p in pieces if isinstance(p, int)]
    kept = tokenizer.decode([one for one in ids if one not in sentinels])
    assert kept == "".join(unicodedata.normalize("NFC", piece) for piece in between(pieces))


def between(pieces):
    """The texts that sentinels leave together: each is normalised by itself."""
    texts = [""]
    for piece in pieces:
        texts[-1:] = [texts[-1] + piece] if isinstance(piece, str) else [texts[-1], ""]
    return texts


@functools.cache
def cached_tokenizer() -> Qwen3EncoderDecoderTokenizer:
    return Qwen3EncoderDecoderTokenizer.train_from_texts(TEXTS, VOCAB_SIZE, NUM_SENTINELS)


class TestUnknownIds:
    @pytest.mark.parametrize("unknown", [VOCAB_SIZE, -100, 2**40])
    def test_they_are_refused_by_name(self, tokenizer, unknown):
        ids = [5, unknown, 6]
        for decode in (
            tokenizer.decode, tokenizer.convert_ids_to_tokens,
            lambda ids: tokenizer.batch_decode([[5], ids]), lambda ids: tokenizer.decode(torch.tensor(ids)),
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        ):  # fmt: skip
            with pytest.raises(DataError, match=rf"tokenizer's 500 tokens, found {unknown}\."):
                decode(ids)
        with pytest.raises(DataError, match="500 tokens"):
            tokenizer.decode(unknown)

    def test_known_ones_are_decoded_as_ever(self, tokenizer):
        every = list(range(len(tokenizer)))
        assert tokenizer.decode(every) == Qwen2Tokenizer._decode(tokenizer, every)
        assert len(tokenizer.convert_ids_to_tokens(every)) == VOCAB_SIZE
        assert tokenizer.decode([]) == ""


class TestModeTokens:
    def test_they_follow_the_sentinels_and_survive_saving(self, qwen_base, tmp_path):
        tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(qwen_base, num_sentinel_tokens=8, mode_tokens=True)
        last = tokenizer.sentinel_ids[-1]
        assert tokenizer.mode_token_ids == [last + 1, last + 2, last + 3]
        assert tokenizer.convert_ids_to_tokens(tokenizer.mode_token_ids) == ["[R]", "[S]", "[X]"]
        tokenizer.save_pretrained(tmp_path / "saved")
        again = Qwen3EncoderDecoderTokenizer.from_pretrained(tmp_path / "saved")
        assert again.fingerprint() == tokenizer.fingerprint()
        assert not special_ids(again) & set(again.encode_documents(["x[R] = y[S]"])[0])  # documents are data
        with pytest.raises(ConfigError, match="all of"):
            Qwen3EncoderDecoderTokenizer.from_pretrained(tmp_path / "saved", mode_tokens=False)

    def test_off_by_default_and_the_fingerprint_tells(self, tokenizer):
        assert tokenizer.mode_token_ids == []
        other = Qwen3EncoderDecoderTokenizer.train_from_texts(TEXTS, VOCAB_SIZE, NUM_SENTINELS, mode_tokens=True)
        assert other.mode_token_ids == [497, 498, 499] and other.sentinel_ids[-1] == 496
        assert other.fingerprint() != tokenizer.fingerprint()


class TestSaving:
    def test_transformers_alone_reads_the_same(self, tokenizer, tmp_path):
        """In a process that has never imported this package."""
        tokenizer.save_pretrained(tmp_path)
        texts = [*HOSTILE, "é<extra_id_4>\u4e2d"]
        program = (
            "import json, sys\nfrom transformers import AutoTokenizer\n"
            "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
            "assert 'encdec' not in sys.modules\n"
            "ids = tokenizer(json.loads(sys.argv[2])).input_ids\n"
            "print(json.dumps([ids, tokenizer.eos_token, tokenizer.pad_token]))"
        )
        command = [sys.executable, "-c", program, str(tmp_path), json.dumps(texts)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == [tokenizer(texts).input_ids, tokenizer.eos_token, tokenizer.pad_token]

    def test_round_trip(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        for load in (Qwen3EncoderDecoderTokenizer.from_pretrained, AutoTokenizer.from_pretrained):
            loaded = load(tmp_path)
            assert type(loaded) is Qwen3EncoderDecoderTokenizer
            assert loaded.fingerprint() == tokenizer.fingerprint()
            assert loaded.sentinel_ids == tokenizer.sentinel_ids
            assert loaded.encode_documents(HOSTILE) == tokenizer.encode_documents(HOSTILE)

    def test_sentinels_are_added_where_missing(self, qwen_base, tmp_path):
        base = AutoTokenizer.from_pretrained(qwen_base)
        tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(qwen_base, num_sentinel_tokens=30)
        assert tokenizer.sentinel_ids == list(range(len(base), len(base) + 30))
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
        assert tokenizer("some text").input_ids == base("some text").input_ids
        tokenizer.save_pretrained(tmp_path / "grown")
        again = Qwen3EncoderDecoderTokenizer.from_pretrained(tmp_path / "grown")
        assert again.fingerprint() == tokenizer.fingerprint()

    def test_the_default_is_100_sentinels(self, qwen_base):
        assert len(Qwen3EncoderDecoderTokenizer.from_pretrained(qwen_base).sentinel_ids) == 100

    def test_more_sentinels_can_follow_but_none_can_go(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        more = Qwen3EncoderDecoderTokenizer.from_pretrained(tmp_path, num_sentinel_tokens=25)
        assert more.sentinel_ids == list(range(VOCAB_SIZE - NUM_SENTINELS, VOCAB_SIZE + 5))
        with pytest.raises(ConfigError, match="20 present and num_sentinel_tokens=10"):
            Qwen3EncoderDecoderTokenizer.from_pretrained(tmp_path, num_sentinel_tokens=10)

    def test_sentinels_with_a_gap_are_refused(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path / "first")
        other = AutoTokenizer.from_pretrained(tmp_path / "first")
        other.add_tokens(["between"])
        other.save_pretrained(tmp_path / "second")
        with pytest.raises(ConfigError, match="contiguous"):
            Qwen3EncoderDecoderTokenizer.from_pretrained(tmp_path / "second", num_sentinel_tokens=21)

    def test_nothing_to_load_names_a_remedy(self, tmp_path):
        for place in (tmp_path, tmp_path / "absent"):
            with pytest.raises(MissingPrerequisite, match="a tokenizer must be"):
                Qwen3EncoderDecoderTokenizer.from_pretrained(place)


class TestFingerprint:
    def test_it_changes_with_what_decides_the_ids(self, tokenizer):
        same_texts = [
            Qwen3EncoderDecoderTokenizer.train_from_texts(TEXTS, VOCAB_SIZE, NUM_SENTINELS + 1),
            Qwen3EncoderDecoderTokenizer.train_from_texts(TEXTS, VOCAB_SIZE + 1, NUM_SENTINELS),
            Qwen3EncoderDecoderTokenizer.train_from_texts(TEXTS[:2], VOCAB_SIZE, NUM_SENTINELS),
        ]
        digests = {other.fingerprint() for other in (tokenizer, *same_texts)}
        assert len(digests) == 4
        assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in digests)

    def test_it_does_not_change_with_use(self, tokenizer):
        before = tokenizer.fingerprint()
        tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
        assert tokenizer.fingerprint() == before


class TestAgreement:
    def config(self, tokenizer, **changes) -> Qwen3EncoderDecoderConfig:
        ids = {
            "vocab_size": VOCAB_SIZE,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "decoder_start_token_id": tokenizer.decoder_start_token_id,
            "sentinel_start_id": tokenizer.sentinel_ids[0],
            "num_sentinel_tokens": NUM_SENTINELS,
        }
        return Qwen3EncoderDecoderConfig(**(SHAPE | ids | changes))

    def test_equal_ids_pass(self, tokenizer):
        tokenizer.assert_matches(self.config(tokenizer))
        tokenizer.assert_matches(self.config(tokenizer, vocab_size=512))

    @pytest.mark.parametrize(
        ("name", "theirs"),
        [
            ("pad_token_id", 5),
            ("eos_token_id", 5),
            ("decoder_start_token_id", 5),
            ("num_sentinel_tokens", 19),
            ("sentinel_start_id", 490),
            ("mode_token_ids", [509, 510, 511]),
        ],
    )
    def test_a_difference_names_both_values(self, tokenizer, name, theirs):
        config = self.config(tokenizer, **{"vocab_size": 512, name: theirs})
        ours = {"num_sentinel_tokens": NUM_SENTINELS, "sentinel_start_id": tokenizer.sentinel_ids[0]}
        with pytest.raises(ConfigError, match=name) as caught:
            tokenizer.assert_matches(config)
        assert str(theirs) in str(caught.value)
        assert str(ours.get(name, getattr(tokenizer, name, None))) in str(caught.value)

    def test_a_vocabulary_larger_than_the_embedding_is_refused(self, tokenizer, tmp_path):
        config = self.config(tokenizer)
        tokenizer.save_pretrained(tmp_path)
        larger = AutoTokenizer.from_pretrained(tmp_path)
        larger.add_tokens(["one more"])
        with pytest.raises(ConfigError, match="501 tokens and vocab_size=500"):
            larger.assert_matches(config)
