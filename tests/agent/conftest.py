"""Tokenizers of chat models, made from the plain one."""

import copy

import pytest
from chatml import ADDED, CHATML

from agentrl.agent.codec import Codec


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
