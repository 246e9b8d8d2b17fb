"""Stratified advantages in TRL's own GRPOTrainer: its rollouts, rewards and loss, agentrl's advantages."""

import inspect

import pytest
import torch
from datasets import Dataset
from tiny import tiny_llama
from trl import GRPOConfig, GRPOTrainer

from agentrl.advantages import AdvantageError, compute
from agentrl.integrations.trl import StratifiedAdvantages, StratifiedGRPOTrainer, count_tool_results

GROUP, GROUPS = 4, 2
SEARCHES = [0, 1, 1, 0, 2, 2, 1, 1]
REWARDS = [1.0, 0.0, 1.0, 0.0, 0.5, 1.0, 0.0, None]
NUMBERS = [float("nan") if reward is None else reward for reward in REWARDS]
IDS = [row // GROUP for row in range(GROUP * GROUPS)]
OVERRIDDEN = {"_calculate_rewards", "_generate_and_score_completions"}
READ = {
    "_logs",
    "_metrics",
    "accelerator",
    "model",
    "multi_objective_aggregation",
    "num_generations",
    "num_generations_eval",
    "reward_weights",
}


def searches(prompts, completions, completion_ids, **columns):
    return SEARCHES


def make_trainer(tmp_path, tokenizer, *, kind=StratifiedGRPOTrainer, reward_funcs=None, config=None, **settings):
    model = tiny_llama(
        len(tokenizer),
        hidden=16,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward_funcs or (lambda **columns: REWARDS),
        train_dataset=Dataset.from_dict(
            {"prompt": ["Question: ", "What? "], "difficulty": ["easy", "hard"]},
        ),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=GROUP * GROUPS,
            num_generations=GROUP,
            max_completion_length=6,
            max_steps=1,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            **(config or {}),
        ),
        **settings,
    )


def rows():
    return [{"prompt": "Question: ", "difficulty": "easy"} for _ in REWARDS]


def scored(trainer):
    trainer.model.train()
    return trainer._generate_and_score_completions(rows())


def expected(estimator="stratified", **options):
    return compute(torch.tensor(NUMBERS), IDS, SEARCHES, estimator, **options).values


def test_the_advantages_are_those_of_compute_to_the_bit(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, strata=searches)
    assert scored(trainer)["advantages"].equal(expected())
    assert list(trainer._logs["advantages"]) == expected().tolist()
    assert trainer._metrics["train"]["advantages/strata/1/rollouts"] == [3.0]


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("stratified", {"alpha": 0.3}),
        ("stratified", {"alpha": "auto"}),
        ("grpo", {"ddof": 1}),
        ("rloo", {}),
        ("agentrl.advantages.estimators.dr_grpo:dr_grpo", {}),
    ],
)
def test_any_estimator_of_rollouts_can_be_chosen(tmp_path, tokenizer, estimator, options):
    trainer = make_trainer(tmp_path, tokenizer, strata=searches, estimator=estimator, estimator_options=options)
    assert scored(trainer)["advantages"].equal(expected(estimator, **options))


def test_lengths_are_those_of_the_completions(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, strata=searches, estimator="opo")
    output = scored(trainer)
    lengths = output["completion_mask"].sum(1)
    assert output["advantages"].equal(expected("opo", lengths=lengths))


def test_rewards_of_several_functions_are_weighed_as_trl_weighs_them(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        strata=searches,
        reward_funcs=[lambda **_: REWARDS, lambda **_: [1.0, None] * GROUP],
        config={"reward_weights": [1.0, 0.5]},
    )
    summed = [(0.0 if r is None else r) + 0.5 * ((i + 1) % 2) for i, r in enumerate(REWARDS)]
    summed[-1] = float("nan")
    assert scored(trainer)["advantages"].equal(compute(torch.tensor(summed), IDS, SEARCHES).values)


def test_strata_can_be_a_column(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, strata="difficulty", estimator_options={"alpha": 1.0})
    one_stratum = compute(torch.tensor(NUMBERS), IDS, [0] * len(IDS), "grpo").values
    assert scored(trainer)["advantages"].equal(one_stratum)


def test_strata_get_what_reward_functions_get(tmp_path, tokenizer):
    seen = {}

    def noting(**given):
        seen.update(given)
        return SEARCHES

    scored(make_trainer(tmp_path, tokenizer, strata=noting))
    assert seen.keys() == {"prompts", "completions", "completion_ids", "difficulty"}
    assert {len(values) for values in seen.values()} == {len(REWARDS)}
    assert all(isinstance(text, str) for text in seen["completions"])


def test_a_step_has_the_gradients_of_trls_loss_at_these_advantages(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, strata=searches)
    batch = scored(trainer)
    trainer.current_gradient_accumulation_steps = 1

    def gradients(kind):
        trainer.model.zero_grad()
        plain = kind.compute_loss(trainer, trainer.model, batch)
        plain.backward()
        return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])

    found = gradients(StratifiedGRPOTrainer)
    batch["advantages"] = expected()
    assert found.equal(gradients(GRPOTrainer))
    assert found.abs().max() > 0


def test_training_takes_a_step(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, strata=searches)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert trainer.state.global_step == 1
    assert any(not old.equal(new) for old, new in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.state.log_history[0]["advantages/excluded"] == 1.0


def test_tool_results_are_counted_in_messages_and_not_in_text():
    asked = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "search"}}]}
    found = {"role": "tool", "name": "search", "content": "a passage"}
    said = {"role": "assistant", "content": "Paris"}
    completions = [[said], [asked, found, said], [asked, found, asked, found, said]]
    assert count_tool_results(completions=completions, prompts=[]) == [0, 1, 2]
    with pytest.raises(AdvantageError, match="needs conversational completions"):
        count_tool_results(completions=["text"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "stratifed"}, "unknown estimator 'stratifed'"),
        ({"estimator_options": {"alfa": 1}}, "has no option 'alfa'"),
        ({"estimator": "gigpo"}, "needs more than whole rollouts"),
        ({"config": {"multi_objective_aggregation": "normalize_then_sum"}}, "set it to sum_then_normalize"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_training(tmp_path, tokenizer, settings, message):
    with pytest.raises(AdvantageError, match=message):
        make_trainer(tmp_path, tokenizer, strata=searches, **settings)


@pytest.mark.parametrize(
    ("strata", "message"),
    [
        (lambda **_: [0], "strata must give 8 keys, one for each completion, got 1"),
        ("hops", "strata names the column 'hops'; there are: prompt, difficulty"),
    ],
)
def test_strata_that_do_not_fit_are_an_error(tmp_path, tokenizer, strata, message):
    with pytest.raises(AdvantageError, match=message):
        scored(make_trainer(tmp_path, tokenizer, strata=strata))


def test_what_is_relied_on_in_trl_is_there(tmp_path, tokenizer):
    plain = make_trainer(tmp_path, tokenizer, kind=GRPOTrainer)
    assert {name for name in vars(StratifiedAdvantages) if hasattr(GRPOTrainer, name)} >= OVERRIDDEN
    for name in OVERRIDDEN:
        theirs = inspect.signature(getattr(GRPOTrainer, name)).parameters
        assert list(inspect.signature(getattr(StratifiedAdvantages, name)).parameters) == list(theirs)
    assert [name for name in READ if not hasattr(plain, name)] == []
