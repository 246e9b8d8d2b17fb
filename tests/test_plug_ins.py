"""What a config names by import path, and its options, is checked before anything starts, in every command."""

import pytest

from agentrl.advantages import ESTIMATORS, STRATIFIERS
from agentrl.config import ConfigError, parse_config
from agentrl.plug_ins import check_plug_ins

MODULE = '''
"""A user's own parts, some of which do not fit."""

from agentrl.advantages import Estimate

number = 3


def estimator(batch, *, weight=1.0):
    return batch.rewards * weight


def forgetful_estimator(batch):
    return Estimate(batch.rewards, {"seen": sum(notes["sen"] for notes in batch.past)})


def short_estimator(batch):
    return batch.rewards[:1]


def failing_estimator(batch):
    raise KeyError("mine")


def first_action(trajectory):
    return trajectory.turns[0].action.kind


def answer(trajectory):
    return trajectory.answer or ""


def unhashable(trajectory):
    return []


class Protocol:
    def __init__(self, config, codec, tools):
        raise AssertionError("made, where it should only be looked at")


class Tool:
    name, description = "look", "Look up."
    parameters = {"type": "object", "properties": {"key": {"type": "string"}}}

    def __init__(self, place):
        raise AssertionError("made, where it should only be looked at")

    async def call(self, key=""):
        return key


class NamelessTool(Tool):
    name = "Look up"


class ProtocolOfOldTimes:
    def __init__(self, config):
        pass


class Retriever:
    def __init__(self, url, *, limit=3):
        raise AssertionError("made, where it should only be looked at")


class Wire:
    def request(self, queries, k): ...
    def hits(self, payload, count, k): ...
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "plug_ins_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def config(**sections):
    return parse_config({"name": "small", "model": {"path": "some/model"}} | sections, source="test")


def of_object(target, **options):
    return {"retriever": {"kind": "object", "target": target, "options": options}}


def of_server(wire):
    return {"retriever": {"kind": "http", "url": "http://127.0.0.1:9/retrieve", "wire": wire}}


@pytest.mark.parametrize(
    "sections",
    [
        {"advantages": {"estimator": "plug_ins_of_mine:estimator", "options": {"weight": 2.0}}},
        {"advantages": {"estimator": "plug_ins_of_mine:estimator", "options": {"weight": {"start": 1.0, "end": 0.0}}}},
        {"advantages": {"stratum": "random_like:plug_ins_of_mine:answer"}},
        {"agent": {"protocol": "plug_ins_of_mine:Protocol"}},
        {"agent": {"tools": ["search", {"kind": "plug_ins_of_mine:Tool", "options": {"place": "here"}}]}},
        of_object("plug_ins_of_mine:Retriever", url="http://here", limit=5),
        of_server("plug_ins_of_mine:Wire"),
    ],
    ids=str,
)
def test_parts_that_fit_are_accepted_and_not_made(mine, sections):
    check_plug_ins(config(**sections))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_is_accepted_with_every_stratifier(estimator):
    for name in STRATIFIERS:
        for stratum in (["searches", name], f"random_like:{name}"):
            check_plug_ins(config(advantages={"estimator": estimator, "stratum": stratum, "scope": "batch"}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"advantages": {"estimator": "stratifed"}}, r"advantages\.estimator: unknown .* did you mean stratified"),
        ({"advantages": {"estimator": "nowhere:f"}}, r"advantages\.estimator: .*'nowhere:f' cannot be imported"),
        (
            {"advantages": {"estimator": "plug_ins_of_mine:number"}},
            r"advantages\.estimator: .* is a int, not a function",
        ),
        (
            {"advantages": {"estimator": "plug_ins_of_mine:short_estimator"}},
            r"advantages\.estimator: .* 2 finite numbers",
        ),
        (
            {"advantages": {"estimator": "plug_ins_of_mine:failing_estimator"}},
            r"advantages\.estimator: .* KeyError: 'mine'",
        ),
        (
            {"advantages": {"estimator": "plug_ins_of_mine:forgetful_estimator"}},
            r"advantages\.estimator: .* KeyError: 'sen'",
        ),
        (
            {"advantages": {"estimator": "value_baseline", "options": {"ridge": 0}}},
            "ridge must be a finite number above",
        ),
        (
            {"agent": {"tools": ["plug_ins_of_mine:Tool"]}},
            r"agent\.tools: .*:Tool .* missing .*'place'; it takes \(place\)",
        ),
        (
            {"agent": {"tools": [{"kind": "plug_ins_of_mine:NamelessTool", "options": {"place": ""}}]}},
            r"agent\.tools: the name of plug_ins_of_mine:NamelessTool is 'Look up'",
        ),
        ({"agent": {"tools": ["nowhere:T"]}}, r"agent\.tools: tool 'nowhere:T' cannot be imported"),
        ({"agent": {"tools": [{"kind": "search", "options": {"k": 3}}]}}, r"agent\.tools: search takes no options"),
        ({"advantages": {"options": {"alfa": 1.0}}}, r"advantages\.options: .* no option 'alfa' .*did you mean alpha"),
        (
            {"advantages": {"options": {"alpha": {"start": 1.0}}}},
            r"advantages\.options: alpha: .* needs a start and an end",
        ),
        ({"advantages": {"options": {"alpha": {"rule": "sine"}}}}, r"advantages\.options: alpha: rule must be one of"),
        ({"advantages": {"options": {"alpha": 1.5}}}, r"advantages\.estimator: .*alpha must be auto, or from 0"),
        ({"advantages": {"options": {"alpha": {"start": 1, "end": -0.5}}}}, "alpha must be auto, or from 0"),
        ({"advantages": {"options": {"alpha": {"rule": "progress", "end": 2.0}}}}, "alpha must be auto, or from 0"),
        ({"advantages": {"options": {"balance": -1}}}, "balance must be"),
        ({"advantages": {"options": {"eps": "small"}}}, r"advantages\.estimator: .*'eps': 'small'.*TypeError"),
        ({"advantages": {"stratum": "placement", "options": {"degenerate": "merge"}}}, "keys are finite numbers"),
        ({"advantages": {"stratum": "serches"}}, r"advantages\.stratum: unknown .* did you mean searches"),
        ({"advantages": {"stratum": "random_like:serches"}}, r"advantages\.stratum: unknown .* did you mean searches"),
        ({"advantages": {"stratum": "random_like"}}, r"advantages\.stratum: .* write it as random_like:searches"),
        ({"advantages": {"stratum": []}}, r"advantages\.stratum: .* at least one"),
        ({"advantages": {"stratum": "plug_ins_of_mine:first_action"}}, r"advantages\.stratum: .* IndexError"),
        ({"advantages": {"stratum": "plug_ins_of_mine:unhashable"}}, "strata.*hash"),
        ({"agent": {"protocol": "json_tool"}}, r"agent\.protocol: unknown .* did you mean json_tools"),
        ({"agent": {"protocol": "plug_ins_of_mine:Nothing"}}, r"agent\.protocol: .* cannot be imported"),
        ({"agent": {"protocol": "plug_ins_of_mine:ProtocolOfOldTimes"}}, r"agent\.protocol: .* too many positional"),
        (of_object("mine"), r"retriever\.target: .* is not an import path"),
        (of_object("plug_ins_of_mine:Retriever"), r"retriever\.options: .* missing a required argument: 'url'"),
        (of_object("plug_ins_of_mine:Retriever", url="x", limt=3), r"retriever\.options: .* unexpected .*'limt'"),
        (of_server("plug_ins_of_mine:Retriever.limit"), r"retriever\.wire: .* cannot be imported"),
        (of_server("plug_ins_of_mine:number"), r"retriever\.wire: .* has no request and no hits"),
    ],
    ids=str,
)
def test_a_part_that_does_not_fit_is_named_by_its_key(mine, sections, message):
    with pytest.raises(ConfigError, match=message):
        check_plug_ins(config(**sections))


@pytest.mark.parametrize(
    "command", [["train"], ["train", "--dry-run"], ["eval"], ["rollout", "--show"], ["warmstart"]], ids=" ".join
)
def test_every_command_checks_them_before_anything_else(agentrl, tmp_path, command):
    path = tmp_path / "small.yaml"
    path.write_text("name: small\nmodel: {path: some/model}\nadvantages: {stratum: serches}\n")
    name, *flags = command
    status, out, err = agentrl(name, "--config", path, *flags)
    assert (status, out) == (1, "")
    assert err.startswith("error: advantages.stratum: unknown stratifier 'serches'")
    assert err.rstrip().endswith("did you mean searches?")


@pytest.mark.parametrize(
    ("section", "where"),
    [
        (
            {"kind": "object", "options": {"url": "http://x", "limit": 1, "headers": {"Authorization": "sk-1234"}}},
            "options",
        ),
        ({"kind": "http", "url": "http://x.test/?api_key=sk-1234"}, "url"),
        ({"kind": "http", "url": "http://x.test/", "token_env": "sk-1234"}, "token_env"),
    ],
)
def test_a_key_that_stands_in_a_config_is_refused_and_not_printed(mine, section, where):
    target = {"target": "plug_ins_of_mine:Retriever"} if section["kind"] == "object" else {}
    with pytest.raises(ConfigError, match=rf"`retriever\.{where}.* holds a key.*headers_env") as raised:
        check_plug_ins(config(retriever=section | target))
    assert "sk-1234" not in str(raised.value)


@pytest.mark.parametrize(
    "endpoint", [{"url": "http://x.test/v1?key=sk-1234"}, {"url": "http://x.test/v1", "key_env": "sk-1234"}]
)
def test_a_key_that_stands_in_an_endpoint_is_refused_and_not_printed(endpoint):
    with pytest.raises(ConfigError, match=r"`engine\.endpoint\.(url|key_env)` holds a key") as raised:
        check_plug_ins(config(engine={"kind": "openai", "endpoint": endpoint | {"model": "m"}}))
    assert "sk-1234" not in str(raised.value)
