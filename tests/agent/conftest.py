"""Tokenizers of chat models, made from the plain one, and tokenizers that split text in other ways."""

import copy

import pytest
from chatml import ADDED, CHATML

from agentrl.agent.codec import Codec
from agentrl.agent.protocols import SearchTags


@pytest.fixture(scope="session")
def chat_codec(tokenizer):
    """The fixture tokenizer as a chat model's, with ids for the tags of tools."""
    made = copy.deepcopy(tokenizer)
    made.add_tokens(ADDED)
    made.chat_template = CHATML
    return Codec(made)


@pytest.fixture
def with_template(chat_codec):
    """Make the chat codec with another template."""

    def make(template, **changes):
        made = copy.deepcopy(chat_codec.tokenizer)
        made.chat_template = template
        for name, value in changes.items():
            setattr(made, name, value)
        return Codec(made)

    return make


# Scripts with spaces between words and without.
WRITTEN = (
    "the river Elbe ends at Cuxhaven and the Main at Mainz, internationalisation notwithstanding. ",
    "泰河是苏格兰最长的河流它从本劳伊山流出经过洛泰湖向东流入北海。",
    "กรุงเทพเป็นเมืองหลวงของประเทศไทย",
    "bbbbbbbbxyz/?=&",
)


def _byte_level(across_words):
    """A byte-level BPE, as of GPT-2, whose tokens end where words do, or as of SuperBPE, whose tokens need not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        WRITTEN * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return core


def _unigram():
    """A unigram model, as of SentencePiece, which puts a mark before a text and splits a prefix anew."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    frame = SearchTags().worked_examples(2)
    core.train_from_iterator(
        [*WRITTEN, frame, "Nothing was found. Id: 0123456789"],
        trainers.UnigramTrainer(vocab_size=260, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
    )
    return core


@pytest.fixture(scope="session", params=["words", "across words", "unigram"])
def any_codec(request):
    """Codecs of tokenizers that split text in different ways."""
    from transformers import PreTrainedTokenizerFast

    core = _unigram() if request.param == "unigram" else _byte_level(request.param == "across words")
    return Codec(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>"))
