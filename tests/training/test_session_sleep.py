"""When engines that share the trainer's card sleep."""

from test_session import Engines, make_config, model, run  # noqa: F401, a fixture

from agentrl.training.trainer import StratifiedTrainer


def test_engines_that_share_the_trainers_card_sleep_while_it_trains_and_at_no_other_time(model, tmp_path, monkeypatch):  # noqa: F811
    seen = []

    class Sleepers(Engines):
        """Each call is seen; a turn is sampled and weights are loaded by engines that are awake."""

        def sleep(self):
            seen.append("sleep")

        def wake(self):
            seen.append("wake")

        def publish(self, version, files):
            seen.append(f"publish {version}")
            super().publish(version, files)

        def _episodes(self, question, names):
            seen.append("sample")
            return super()._episodes(question, names)

    backward = StratifiedTrainer.backward

    def watched(self, batch):
        seen.append("train")
        return backward(self, batch)

    monkeypatch.setattr(StratifiedTrainer, "backward", watched)
    config = make_config(model, tmp_path, steps=2, updates_per_batch=2)
    # Nothing on a CPU is worth sleeping for, so the configuration refuses it there; the order is the same.
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"sleep": True})})
    run(config, Sleepers())
    step = ["wake", "publish {}", "sample", "sample", "sleep", "train", "train"]
    # The last weights are evaluated.
    assert seen == [call.format(number) for number in range(2) for call in step] + ["wake"]
