"""An episode hands the engine exactly the ids that were sampled and observed, and always ends for a named reason."""

import asyncio
import copy
import itertools
import re

import pytest
from fakes import PassageRetriever, ScriptedEngine, passage
from hypothesis import given
from hypothesis import strategies as st
from playing import ANSWER, ELBE, NONSENSE, QUESTION, SEARCH, play, prompt_of, settings

from agentrl.agent.codec import Codec
from agentrl.agent.episode import Agent, turn_seed
from agentrl.agent.protocols import get_protocol
from agentrl.config import ConfigError
from agentrl.types import End, Question


def letter_by_letter(codec, text):
    """Return ids that decode to `text` but are not what encoding it gives."""
    ids = [token for letter in text for token in codec.encode(letter)]
    assert codec.decode(ids) == text
    assert codec.encode(text) != ids
    return ids


def test_the_engine_is_handed_the_very_ids_that_were_sampled_and_observed(codec):
    # A lone byte of a character that takes two decodes to a replacement character, whose encoding is another.
    broken = [*codec.encode("é")[:1], *letter_by_letter(codec, SEARCH)]
    assert codec.encode(codec.decode(broken)) != broken
    script = [
        broken,
        letter_by_letter(codec, NONSENSE),
        letter_by_letter(codec, SEARCH),
        letter_by_letter(codec, ANSWER),
    ]
    episode, engine = play(codec, script)
    assert episode.end is End.ANSWERED
    context = list(episode.prompt_ids)
    for turn, sampled, handed in zip(episode.turns, script, engine.prompts, strict=True):
        assert handed == context
        assert list(turn.token_ids) == sampled
        context += [*turn.token_ids, *turn.observation_ids]
    assert [*episode.prompt_ids, *episode.completion_ids] == context


def test_an_observation_is_encoded_alone(codec):
    episode, _ = play(codec, [SEARCH, ANSWER])
    first = episode.turns[0]
    assert list(first.observation_ids) == codec.encode(first.observation)
    assert "Doc 1(Title: Elbe) The Elbe ends at Cuxhaven." in first.observation


def test_the_mask_marks_exactly_what_was_sampled(codec):
    episode, _ = play(codec, [SEARCH, NONSENSE, ANSWER])
    marked = [token for token, mine in zip(episode.completion_ids, episode.action_mask, strict=True) if mine]
    assert marked == [*codec.encode(SEARCH), *codec.encode(NONSENSE), *codec.encode(ANSWER)]
    assert episode.action_mask.count(False) == sum(len(turn.observation_ids) for turn in episode.turns) > 0


def test_a_turn_keeps_the_samplers_logprobs_and_adapter_version(codec):
    episode, _ = play(codec, [SEARCH, ANSWER], version=4)
    assert episode.adapter_versions == (4, 4)
    assert episode.turns[1].logprobs == tuple(-0.1 * (i + 1) for i in range(len(codec.encode(ANSWER))))


def test_an_answer_ends_the_episode(codec):
    retriever = PassageRetriever(ELBE)
    episode, _ = play(codec, [SEARCH, ANSWER], retriever=retriever)
    assert (episode.end, episode.answer, episode.failure) == (End.ANSWERED, "Cuxhaven", "")
    assert retriever.queries == ["Elbe"]
    assert [call.query for call in episode.searches] == ["Elbe"]
    assert episode.searches[0].passage_ids == ("p0",)
    assert episode.turns[-1].observation_ids == ()


def test_a_search_beyond_the_last_is_neither_executed_nor_counted(codec):
    retriever = PassageRetriever(ELBE)
    episode, _ = play(codec, [SEARCH] * 3, retriever=retriever)
    assert (episode.end, episode.answer) == (End.TURN_LIMIT, None)
    assert (len(episode.turns), len(episode.searches), len(retriever.queries)) == (3, 2, 2)


def test_an_answer_after_the_last_search_counts(codec):
    assert play(codec, [SEARCH, SEARCH, ANSWER])[0].end is End.ANSWERED


def test_without_turns_the_first_search_ends_the_episode(codec):
    episode, _ = play(codec, [SEARCH], config=settings(max_turns=0))
    assert (episode.end, episode.searches) == (End.TURN_LIMIT, ())


@pytest.mark.parametrize("corrections", [0, 1, 2])
def test_nonsense_is_corrected_as_often_as_allowed_and_then_ends_the_episode(codec, corrections):
    episode, _ = play(codec, [NONSENSE] * (corrections + 1), config=settings(max_invalid=corrections))
    assert episode.end is End.INVALID
    assert ["Invalid action: no <search>" in turn.observation for turn in episode.turns] == [True] * corrections + [
        False
    ]


def test_a_correction_costs_no_search(codec):
    episode, _ = play(codec, [NONSENSE, SEARCH, SEARCH, ANSWER])
    assert (episode.end, len(episode.searches)) == (End.ANSWERED, 2)


def test_a_turn_that_runs_out_of_tokens_is_told_so(codec):
    episode, engine = play(codec, ["word " * 100, ANSWER], config=settings(max_turn_tokens=20))
    assert episode.turns[0].action.kind == "invalid"
    assert "Invalid action: the turn was too long." in episode.turns[0].observation
    assert len(episode.turns[0].token_ids) == engine.samplings[0].max_tokens == 20


def test_an_episode_whose_last_turn_is_cut_off_is_overlong_and_one_that_talks_nonsense_is_not(codec):
    for said, overlong in (("word " * 100, True), (NONSENSE, False)):
        episode, _ = play(codec, [said], config=settings(max_turn_tokens=40, max_invalid=0))
        assert (episode.end, episode.overlong) == (End.INVALID, overlong)


def test_a_search_whose_passages_would_not_fit_is_not_executed(codec):
    config = settings(max_turn_tokens=64, max_observation_tokens=40, max_episode_tokens=114)
    retriever = PassageRetriever(ELBE)
    long_search = f"<search> {'e' * 50} </search>"
    prompt, turn = prompt_of(config, codec), codec.encode(long_search)
    assert 114 - 48 < len(prompt) + len(turn) < 114
    episode, _ = play(codec, [long_search], config=config, retriever=retriever)
    assert (episode.end, episode.searches, retriever.queries) == (End.TRUNCATED, (), [])
    assert episode.turns[0].action.kind == "search"


def test_a_correction_that_would_not_fit_is_not_given(codec):
    prompt = prompt_of(settings(), codec)
    config = settings(max_turn_tokens=16, max_observation_tokens=32, max_episode_tokens=len(prompt) + 16 + 48)
    episode, _ = play(codec, [list(range(100, 116))], config=config)
    assert (episode.end, len(episode.turns), episode.turns[0].observation_ids) == (End.TRUNCATED, 1, ())


said = st.one_of(
    st.sampled_from([SEARCH, NONSENSE, ANSWER, "", "word " * 60, "<search> a </search> <search>"]),
    st.lists(st.integers(3, 300), max_size=120),
)


@given(
    script=st.lists(said, min_size=8, max_size=8),
    turns=st.integers(0, 4),
    corrections=st.integers(0, 2),
    turn_tokens=st.integers(8, 120),
    observation_tokens=st.integers(32, 120),
    room=st.integers(1, 300),
)
def test_no_script_outgrows_the_context_or_the_limits(
    codec, script, turns, corrections, turn_tokens, observation_tokens, room
):
    config = settings(
        max_turns=turns,
        max_invalid=corrections,
        max_turn_tokens=turn_tokens,
        max_observation_tokens=observation_tokens,
        max_episode_tokens=max(turn_tokens, observation_tokens) + 40 + room,
    )
    retriever = PassageRetriever(*[passage("Elbe", "It ends at Cuxhaven. " * 20)] * 3)
    episode, engine = play(codec, script, config=config, retriever=retriever)
    assert len(episode.prompt_ids) + len(episode.completion_ids) <= config.max_episode_tokens
    for handed, sampling in zip(engine.prompts, engine.samplings, strict=True):
        assert 1 <= sampling.max_tokens <= turn_tokens
        assert len(handed) + sampling.max_tokens <= config.max_episode_tokens
    assert len(episode.searches) == len(retriever.queries) <= turns
    assert len(episode.turns) <= turns + corrections + 1
    assert (episode.answer is not None) == (episode.end is End.ANSWERED)
    assert episode.turns[-1].observation_ids == ()


def test_the_engine_is_told_how_to_sample(codec):
    _, engine = play(codec, [ANSWER])
    sampling = engine.samplings[0]
    assert (sampling.temperature, sampling.stop, sampling.max_tokens) == (0.7, ("</search>", "</answer>"), 96)


def test_seeds_differ_by_turn_and_episode_and_not_by_order(codec):
    def seeds(names):
        return {name: [s.seed for s in play(codec, [SEARCH, ANSWER], name=name)[1].samplings] for name in names}

    names = ["1/0/0", "1/0/1", "1/1/0"]
    forwards = seeds(names)
    assert forwards == seeds(reversed(names))
    assert len({seed for pair in forwards.values() for seed in pair}) == 6


@given(st.integers(0, 2**31), st.text(max_size=8), st.integers(0, 20))
def test_a_seed_has_32_bits_and_follows_from_its_three_parts(seed, name, turn):
    value = turn_seed(seed, name, turn)
    assert 0 <= value < 2**32
    assert value == turn_seed(seed, name, turn)
    others = {turn_seed(seed + 1, name, turn), turn_seed(seed, name + "x", turn), turn_seed(seed, name, turn + 1)}
    assert value not in others


def test_the_plain_prompt_is_instruction_examples_and_question(codec):
    config = settings(instruction=None, worked_examples=1, max_episode_tokens=4096)
    protocol, ids = get_protocol(config, codec), prompt_of(config, codec)
    expected = f"{protocol.instruction()}{protocol.worked_examples(1)}Question: {QUESTION.text}\n"
    assert codec.decode(ids) == expected


def test_an_empty_instruction_leaves_the_question_alone(codec):
    assert codec.decode(prompt_of(settings(), codec)) == f"Question: {QUESTION.text}\n"


def test_a_chat_prompt_without_a_template_is_refused(codec):
    with pytest.raises(ConfigError, match=r"agent\.prompt chat: the chat template .* is missing"):
        prompt_of(settings(prompt="chat"), codec)


def test_a_chat_prompt_goes_through_the_template_with_its_control_tokens(codec, monkeypatch):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    monkeypatch.setattr(codec.tokenizer, "chat_template", template)
    ids = prompt_of(settings(prompt="chat"), codec)
    assert codec.decode(ids) == f"<|im_start|>user\nQuestion: {QUESTION.text}\n<|im_end|>\n<|im_start|>assistant"
    assert ids[0] == codec.tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_question_that_leaves_no_room_is_never_asked_and_is_no_failure_of_the_environment(codec):
    episode, engine = play(codec, [ANSWER], question=Question("nq:8", "why " * 500, ("x",)))
    assert (episode.end, episode.valid, episode.cause) == (End.PROMPT_TOO_LONG, False, None)
    assert re.search(r"the prompt of question nq:8 has \d+ tokens .* agent\.max_episode_tokens 1024", episode.failure)
    # A batch is as wide as its longest prompt, which this one must not be.
    assert engine.prompts == [] == list(episode.prompt_ids)


def test_limits_that_leave_no_question_any_room_are_refused_before_the_first(codec):
    config = settings(instruction="look it up " * 200, max_episode_tokens=256)
    with pytest.raises(
        ConfigError, match=r"agent\.max_episode_tokens 256: the prompt takes \d+ tokens for the question `\?`"
    ):
        play(codec, [], config=config)


def test_a_template_that_is_missing_is_refused_before_the_first_question(codec):
    with pytest.raises(ConfigError, match=r"agent\.prompt chat: the chat template .* is missing"):
        play(codec, [], config=settings(prompt="chat"))


def test_an_unknown_protocol_is_refused_with_the_known_ones(codec):
    with pytest.raises(ConfigError, match=r"agent\.protocol: unknown protocol 'tags' \(there are: .*search_tags"):
        play(codec, [ANSWER], config=settings(protocol="tags"))


def test_episodes_that_run_at_once_do_not_touch_one_another(codec):
    async def together():
        scripts = [[SEARCH, ANSWER], [ANSWER], [NONSENSE, SEARCH, ANSWER]]
        agents = [Agent(settings(), codec, ScriptedEngine(codec, s), PassageRetriever(ELBE), 3) for s in scripts]
        runs = [a.run(QUESTION, str(i), temperature=1.0, seed=0, timeout=60.0) for i, a in enumerate(agents)]
        return await asyncio.gather(*runs)

    episodes = asyncio.run(together())
    assert [len(episode.turns) for episode in episodes] == [2, 1, 3]
    assert all(a.id != b.id for a, b in itertools.combinations(episodes, 2))


def test_a_tag_whose_last_id_says_more_still_acts_and_keeps_its_ids(codec):
    tokenizer = copy.deepcopy(codec.tokenizer)
    tokenizer.add_tokens([">; and"])
    shared = Codec(tokenizer)
    ids = [*codec.encode(SEARCH[:-1]), *shared.encode(">; and")]
    retriever = PassageRetriever(ELBE)
    episode, _ = play(shared, [ids, ANSWER], retriever=retriever)
    assert (episode.end, retriever.queries) == (End.ANSWERED, ["Elbe"])
    assert list(episode.turns[0].token_ids) == ids
    assert episode.turns[0].text == f"{SEARCH}; and"


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_mistakes_can_share_the_turns_with_searches(codec, turns):
    config = settings(max_turns=turns, max_invalid=0, mistakes_are_turns=True)
    episode, _ = play(codec, [NONSENSE, SEARCH] * 2, config=config)
    assert (episode.end, len(episode.turns)) == (End.TURN_LIMIT, turns + 1)


class Halfway:
    """Lacks what a protocol needs."""

    stop = ()

    def __init__(self, config, codec, tools):
        pass


def test_a_class_that_is_no_protocol_is_refused_by_what_it_lacks(codec):
    with pytest.raises(ConfigError, match=r"agent\.protocol test_episode:Halfway has no `prompt`"):
        play(codec, [ANSWER], config=settings(protocol="test_episode:Halfway"))
