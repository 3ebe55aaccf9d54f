"""The first line that a user writes: sizes by the machine, what is shown meanwhile, and what the log holds."""

import copy
import csv
import inspect
import pathlib

import gymnasium as gym
import numpy as np
import optuna
import pytest
import torch as th
import yaml
from conftest import TINY
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

import sb3_boom
from sb3_boom import BOOM, zoo
from sb3_boom.checks import FORMAT_VERSION
from sb3_boom.presets import PRESETS, choose_preset
from sb3_boom.progress import Pace, duration

DATA = pathlib.Path(__file__).parent / "data"
SHORT = dict(TINY, policy_kwargs=dict(TINY["policy_kwargs"], mlp_dim=8, enc_dim=8, latent_dim=8))
OBS = np.array([1.0, 0.0, 0.0], dtype=np.float32)


def short_pendulum(**kwargs) -> gym.Env:
    return gym.make("Pendulum-v1", max_episode_steps=10, **kwargs)


def sizes(model: BOOM) -> tuple:
    planner = model.policy.planner_config
    chosen = (planner.n_samples, planner.n_elites, planner.n_policy_samples, planner.n_iterations)
    return model.preset, model.policy.model_size, model.batch_size, chosen


CPU = ("cpu", "tiny", 128, (128, 16, 6, 4))
PAPER = ("paper", "5M", 256, (512, 64, 24, 6))


# ---------------------------------------------------------------- the machine decides


@pytest.mark.parametrize(("device", "preset"), [("cpu", "cpu"), ("cuda", "paper")])
def test_the_machine_decides_the_preset(device, preset):
    assert choose_preset("auto", th.device(device)) == preset
    assert choose_preset("paper", th.device(device)) == "paper"


def test_defaults_on_a_cpu_are_those_for_two_cores():
    model = BOOM("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu")
    assert sizes(model) == CPU and model.alignment == "forward_kl"


def test_what_is_given_wins():
    policy_kwargs = dict(TINY["policy_kwargs"], model_size="1M")
    model = BOOM(
        "MlpPolicy",
        "Pendulum-v1",
        buffer_size=10,
        policy_kwargs=policy_kwargs,
        planner_kwargs=dict(n_samples=64),
        device="cpu",
    )
    assert sizes(model) == ("cpu", "1M", 128, (64, 16, 6, 4))
    model = BOOM("MlpPolicy", "Pendulum-v1", buffer_size=10, preset="paper", batch_size=32, policy_kwargs=policy_kwargs)
    assert sizes(model) == ("paper", "1M", 32, (512, 64, 24, 6))


@pytest.mark.parametrize(("preset", "expected"), [("cpu", CPU), ("paper", PAPER)])
def test_a_model_goes_on_as_it_was_on_another_kind_of_device(preset, expected, tmp_path, monkeypatch):
    small = dict(mlp_dim=8, enc_dim=8, latent_dim=8, compile=False)
    model = BOOM("MlpPolicy", "Pendulum-v1", buffer_size=10, preset=preset, policy_kwargs=small)
    model.save(tmp_path / "model")
    monkeypatch.setattr("sb3_boom.presets.choose_preset", lambda setting, device: setting)  # "auto" would be an error
    loaded = BOOM.load(tmp_path / "model", env=model.get_env())
    assert sizes(loaded) == sizes(model) == expected
    quick = BOOM.load(tmp_path / "model", planner_kwargs=dict(n_iterations=2))
    assert quick.policy.planner_config.n_iterations == 2
    assert quick.policy.planner_config.n_samples == PRESETS[preset].planner_kwargs["n_samples"]


def test_resolved_settings_are_logged(tmp_path):
    model = BOOM("MlpPolicy", short_pendulum(), **SHORT)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(25, log_interval=1)
    with open(tmp_path / "progress.csv") as file:
        row = next(csv.DictReader(file))
    expected = dict(preset="cpu", model_size="tiny", batch_size="16", n_samples="32", n_iterations="2", learning_starts="20")
    assert {name: row[f"config/{name}"] for name in expected} == expected


def test_one_line_says_what_was_chosen_and_how_long_it_takes(capsys):
    BOOM("MlpPolicy", short_pendulum(), **SHORT, verbose=1).learn(100)
    lines = [line for line in capsys.readouterr().out.splitlines() if "A step takes" in line]
    assert len(lines) == 1
    assert 'preset "cpu" on cpu: model "tiny", 32 samples x 2 iterations a plan, batches of 16' in lines[0]
    assert "the remaining 55 timesteps about" in lines[0]


def test_a_large_model_on_a_cpu_is_warned_about_with_its_cost(monkeypatch):
    monkeypatch.setattr("sb3_boom.progress.SLOW_ON_CPU", 100)
    model = BOOM("MlpPolicy", short_pendulum(), **SHORT)
    with pytest.warns(UserWarning, match=r'about \d+ ms on this CPU. preset="cpu"') as record:
        model.learn(60)
        model.learn(60, reset_num_timesteps=False)
    assert sum("on this CPU" in str(warning.message) for warning in record) == 1


def test_pace_is_of_the_steps_after_the_first_ones(monkeypatch):
    clock = iter([10.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    pace = Pace(skipped=2, measured=4)
    assert [pace.step() for _ in range(8)] == [None] * 6 + [1.0, None]
    assert [duration(seconds) for seconds in (4.4, 600.0, 9000.0)] == ["4 s", "10 min", "2.5 h"]


@pytest.mark.parametrize(("alignment", "scale"), [("release", "q_scale"), ("forward_kl", 5.0), ("reverse_kl", 5.0)])
def test_alignment_does_not_fade_with_returns_except_as_released(alignment, scale):
    assert BOOM("MlpPolicy", "Pendulum-v1", alignment=alignment, buffer_size=10).align_scale == scale
    given = BOOM("MlpPolicy", "Pendulum-v1", alignment=alignment, align_scale=2.0, buffer_size=10)
    assert given._loss_config().align_scale == 2.0


def test_n_steps_reach_the_targets_without_a_word_of_sb3s_buffer(recwarn, tmp_path):
    model = BOOM("MlpPolicy", "Pendulum-v1", n_steps=3, buffer_size=10)
    assert not [warning for warning in recwarn if "n_steps" in str(warning.message)]
    assert (model.n_steps, model._loss_config().n_steps) == (3, 3)
    model.save(tmp_path / "model")
    assert BOOM.load(tmp_path / "model").n_steps == 3


def test_models_from_before_the_alignments_scale_go_on_by_the_q_scale(tmp_path):
    model = BOOM("MlpPolicy", "Pendulum-v1", buffer_size=10)
    del model.align_scale
    model.format_version = 2
    model.save(tmp_path / "model")
    loaded = BOOM.load(tmp_path / "model")
    assert (loaded.align_scale, loaded.format_version) == ("q_scale", FORMAT_VERSION)
    assert BOOM.load(tmp_path / "model", align_scale=2.0).align_scale == 2.0


def chosen(model: BOOM) -> tuple[str, float]:
    return model.policy.planner_config.horizon_value, model._loss_config().tau


class Falls(gym.Wrapper):
    """Ends every episode after five steps, by a termination if ``falls`` and else by a truncation."""

    falls = True

    def reset(self, **kwargs):
        self.left = 5
        return self.env.reset(**kwargs)

    def step(self, action):
        obs, reward, *_, info = self.env.step(action)
        self.left -= 1
        ends = self.left == 0
        return obs, reward, ends and self.falls, ends and not self.falls, info


@pytest.mark.parametrize("falls", [True, False])
def test_targets_follow_sooner_and_plans_trust_the_lowest_critic_once_an_episode_has_been_terminated(falls, tmp_path, capsys):
    env = Falls(short_pendulum())
    env.falls = falls
    model = BOOM("MlpPolicy", env, **SHORT, verbose=1)
    assert chosen(model) == ("mean", 0.01)
    model.learn(21)
    expected, _ = chosen(model)
    assert chosen(model) == (("min", 0.05) if falls else ("mean", 0.01))
    assert capsys.readouterr().out.count('tau=0.05 and horizon_value="min" for plans from now on') == falls
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    loaded = BOOM.load(tmp_path / "model", planner_kwargs=dict(temperature=0.1))
    assert (loaded.policy.planner_config.horizon_value, loaded.policy.planner_config.temperature) == (expected, 0.1)
    assert type(model.policy).load(tmp_path / "policy").planner_config.horizon_value == expected
    assert chosen(loaded) == chosen(model) and BOOM.load(tmp_path / "model", tau=0.02)._loss_config().tau == 0.02
    loaded.set_parameters(BOOM("MlpPolicy", env, **SHORT).get_parameters())
    assert chosen(loaded) == ("mean", 0.01)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(alignment="release"),
        dict(handle_terminations=False),
        dict(tau=0.01, planner_kwargs=dict(horizon_value="mean")),
    ],
)
def test_terminations_change_nothing_as_released_nor_where_they_are_not_learned_nor_what_is_given(kwargs, capsys):
    model = BOOM("MlpPolicy", Falls(short_pendulum()), **{**SHORT, **kwargs}, verbose=1).learn(21)
    assert chosen(model) == ("mean", 0.01) and bool(model.policy.terminations_seen)
    assert "Episodes are terminated" not in capsys.readouterr().out


def test_a_model_loaded_as_released_plans_and_learns_so(tmp_path):
    BOOM("MlpPolicy", Falls(short_pendulum()), **SHORT).learn(21).save(tmp_path / "model")
    assert chosen(BOOM.load(tmp_path / "model", alignment="release")) == ("mean", 0.01)


def test_a_first_termination_after_many_steps_counts_too():
    env = Falls(short_pendulum())
    env.falls = False
    model = BOOM("MlpPolicy", env, **SHORT).learn(24)
    assert chosen(model) == ("mean", 0.01)
    env.falls = True
    model.learn(50, reset_num_timesteps=False)
    assert chosen(model) == ("min", 0.05)


def test_models_from_before_these_were_automatic_keep_theirs(tmp_path):
    model = BOOM("MlpPolicy", Falls(short_pendulum()), **dict(SHORT, planner_kwargs=dict(n_samples=32))).learn(21)
    del model.planner_kwargs["horizon_value"]
    model.tau, model.format_version = 0.01, 3
    model.save(tmp_path / "model")
    for archive in (BOOM.load(tmp_path / "model"), BOOM.load(tmp_path / "model", planner_kwargs=dict(n_samples=16))):
        assert chosen(archive) == ("mean", 0.01) and bool(archive.policy.terminations_seen)


def test_entries_say_their_sizes_and_the_papers_tasks_their_alignment():
    for cpu, preset in ((True, "cpu"), (False, "paper")):
        entries = zoo.read_hyperparams(zoo.hyperparams_file(cpu))
        assert {entry["preset"] for entry in entries.values()} == {preset}
    pixels = yaml.safe_load((zoo.hyperparams_file().parent / "boom-pixels.yml").read_text())
    assert pixels["InvertedPendulum-v5"]["preset"] == "cpu"
    of_the_paper = [name for name in entries if name.startswith(("dm_control/dog", "dm_control/humanoid", "h1hand"))]
    assert len(of_the_paper) == 14
    assert all((entry.get("alignment") == "release") == (name in of_the_paper) for name, entry in entries.items())


@pytest.mark.parametrize(("device", "largest"), [("cpu", "tiny"), ("cuda", "5M")])
def test_the_search_follows_the_machine(device, largest, monkeypatch):
    monkeypatch.setattr(zoo, "get_device", lambda _: th.device(device))
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(0)).ask()
    zoo.sample_boom_params(trial, 1, 1, {})
    assert trial.distributions["model_size"].choices[-1] == largest
    assert trial.distributions["n_samples_pow"].high == (8 if device == "cpu" else 10)


# ---------------------------------------------------------------- pretraining shows


def test_pretraining_has_a_row_of_the_log_for_every_hundred_updates(tmp_path, capsys):
    model = BOOM("MlpPolicy", short_pendulum(), **dict(SHORT, pretrain_steps=250), verbose=1)
    model.set_logger(configure(str(tmp_path), ["csv", "stdout"]))
    model.learn(22)
    with open(tmp_path / "progress.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["pretraining/update"]]
    assert [row["pretraining/update"] for row in rows] == ["100", "200", "250"]
    assert {row["pretraining/of"] for row in rows} == {"250"} and rows[-1]["pretraining/seconds_left"] == "0"
    assert all(np.isfinite(float(row["train/critic_loss"])) for row in rows)
    output = capsys.readouterr().out
    assert "seconds_left" in output and "critic_loss" not in output  # a page each would hide the rest


class StopsPretraining(BaseCallback):
    ended = False

    def _on_step(self) -> bool:
        return True

    def _on_pretraining(self) -> bool:
        return self.model.pretrain_updates < 200

    def _on_training_end(self) -> None:
        self.ended = True


def test_a_callback_stops_pretraining_which_goes_on_there():
    model = BOOM("MlpPolicy", short_pendulum(), **dict(SHORT, pretrain_steps=350))
    callback = StopsPretraining()
    model.learn(30, callback=[callback])
    assert (model.num_timesteps, model.pretrain_updates, model._n_updates) == (20, 200, 200) and callback.ended
    model.learn(10, reset_num_timesteps=False)
    assert model.pretrain_updates == 350 and model.replay_buffer.size() == 30


def test_the_progress_bar_shows_pretraining(monkeypatch):
    shown = []

    class Bar:
        def __init__(self, total):
            self.update = self.refresh = self.close = lambda *_: None

        def set_description(self, text):
            shown.append(text)

    monkeypatch.setattr("stable_baselines3.common.callbacks.tqdm", Bar)
    BOOM("MlpPolicy", short_pendulum(), **dict(SHORT, pretrain_steps=150)).learn(22, callback=ProgressBarCallback())
    assert shown[0].startswith("Pretraining 100 / 150, ") and shown[0].endswith("s left") and shown[1:] == [""]


# ---------------------------------------------------------------- the log


class Reader(BaseCallback):
    """What a callback finds in the logger."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict] = []

    def _on_step(self) -> bool:
        self.found.append(dict(self.logger.name_to_value))
        return True


def test_callbacks_find_the_losses_in_the_logger():
    reader = Reader()
    BOOM("MlpPolicy", "Pendulum-v1", **SHORT).learn(30, callback=reader)
    assert {"train/actor_loss", "train/critic_loss", "train/learning_rate"} <= reader.found[-1].keys()
    assert reader.found[-1]["train/n_updates"] == TINY["pretrain_steps"] + 10
    assert "train/actor_loss" not in reader.found[10]


def test_evaluations_rows_have_losses_though_no_episode_ends(tmp_path):
    endless = gym.make("Pendulum-v1").unwrapped
    model = BOOM("MlpPolicy", endless, **SHORT)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(41, callback=EvalCallback(short_pendulum(), eval_freq=20, n_eval_episodes=1, verbose=0))
    with open(tmp_path / "progress.csv") as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row["eval/mean_reward"]) < 0 and np.isfinite(float(row["train/critic_loss"]))
    assert int(row["train/n_updates"]) == TINY["pretrain_steps"] + 20


def test_losses_on_a_gpu_are_read_every_few_dozen_updates(monkeypatch):
    model = BOOM("MlpPolicy", "Pendulum-v1", **SHORT).learn(20)
    taken = []
    monkeypatch.setattr(model.meters, "take_terms", lambda: taken.append(model.meters.n_updates) or {})
    model.device = th.device("meta")  # which is no CPU
    monkeypatch.setattr(model, "_update", lambda n, _: setattr(model.meters, "n_updates", model.meters.n_updates + n))
    model.meters.n_updates = 0
    for _ in range(40):
        model.train(1)
    assert taken[:1] == [32]


def test_logged_means_are_over_all_updates_since_the_last_dump():
    model = BOOM("MlpPolicy", "Pendulum-v1", **SHORT).learn(20)
    seen = []
    for _ in range(3):
        model.logger.name_to_value.clear(), model.logger.name_to_count.clear()
        model.train(1)
        seen.append(model.logger.name_to_value["train/critic_loss"])
    model.logger.name_to_value.clear(), model.logger.name_to_count.clear()
    model.meters.add_terms(dict(critic_loss=th.tensor(1.0), align_active=th.tensor(1.0)))
    model._record_losses()
    model.meters.add_terms(dict(critic_loss=th.tensor(4.0), align_active=th.tensor(1.0)))
    model._record_losses()
    assert model.logger.name_to_value["train/critic_loss"] == pytest.approx(2.5) and len(set(seen)) == 3


# ---------------------------------------------------------------- infos are the environments'


def with_infos(infos_of):
    """A Pendulum VecEnv of three whose ``step_wait`` returns ``infos_of(infos)``."""
    env = make_vec_env(short_pendulum, n_envs=3, seed=0)
    step_wait = env.step_wait

    def wait():
        obs, rewards, dones, infos = step_wait()
        return obs, rewards, dones, infos_of(infos, dones)

    env.step_wait = wait
    return env


def test_environments_that_share_one_info_keep_their_own_plans():
    env = with_infos(lambda infos, dones: infos if dones.any() else [{}] * 3)
    model = BOOM("MlpPolicy", env, **SHORT).learn(60)
    plans = model.replay_buffer._storage["steps"][12:20, :, 1:3]
    assert all(not th.equal(plans[:, i], plans[:, j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_infos_that_persist_carry_no_plan_into_another_models_warm_up():
    kept = [{}, {}, {}]
    env = with_infos(lambda infos, dones: infos if dones.any() else kept)
    BOOM("MlpPolicy", env, **SHORT).learn(60)
    assert kept == [{}, {}, {}]
    warm_up = BOOM("MlpPolicy", env, **dict(SHORT, seed=1)).learn(15).replay_buffer._storage["steps"][:5]
    assert th.equal(warm_up[..., 0], warm_up[..., 1])


# ---------------------------------------------------------------- SB3's names


def test_networks_have_sb3s_names_on_the_model_and_are_saved_once(tmp_path):
    model = BOOM("MlpPolicy", "Pendulum-v1", **SHORT)
    for name in ("actor", "critic", "critic_target"):
        assert getattr(model, name) is getattr(model.policy, name)
    model.save(tmp_path / "model")
    loaded = BOOM.load(tmp_path / "model")
    assert loaded.actor is loaded.policy.actor


def test_train_takes_the_models_own_batch_size(monkeypatch):
    model = BOOM("MlpPolicy", "Pendulum-v1", **SHORT).learn(20)
    drawn, sample = [], model.replay_buffer.sample
    monkeypatch.setattr(model.replay_buffer, "sample", lambda n, env=None: drawn.append(n) or sample(n, env))
    model.train(gradient_steps=2)
    model.train(gradient_steps=1, batch_size=5)
    assert drawn == [16, 16, 5]


def test_train_by_itself_does_the_updates_it_is_told_and_no_others():
    model = BOOM("MlpPolicy", "Pendulum-v1", **dict(SHORT, learning_starts=100)).learn(10)
    model.train(3)
    assert model._n_updates == 3 and model.pretrain_updates == 0
    model.replay_buffer.reset()
    with pytest.raises(ValueError, match="replay buffer is empty"):
        model.train(1)


def test_a_model_is_copied_after_learning():
    model = BOOM("MlpPolicy", "Pendulum-v1", **SHORT).learn(22)
    assert copy.deepcopy(model).learn(2)._n_updates == model._n_updates + 2


def test_until_the_first_update_actions_are_random():
    model = BOOM("MlpPolicy", short_pendulum(), **dict(SHORT, train_freq=(3, "episode"))).learn(90)
    steps = model.replay_buffer._storage["steps"][:90, 0]
    random = steps[:, 2] > 7.0  # the std stored with them
    assert random.nonzero().max() == 29 and random[:30].all()


def test_a_buffer_is_loaded_where_there_is_none(tmp_path):
    model = BOOM("MlpPolicy", "Pendulum-v1", **SHORT, replay_buffer_kwargs=dict(value_temperature=2.0)).learn(25)
    model.save_replay_buffer(tmp_path / "buffer")
    model.replay_buffer = None
    model.load_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer.size() == 25 and model.replay_buffer.value_temperature == 2.0
    assert model.replay_buffer.horizon == model.horizon


def test_sb3s_own_buffer_argument_is_taken():
    BOOM("MlpPolicy", "Pendulum-v1", **SHORT, replay_buffer_kwargs=dict(handle_timeout_termination=True))


def test_the_package_lists_what_it_has():
    assert {"BOOM", "MlpPolicy", "WeightedReplayBuffer"} <= set(dir(sb3_boom))


def test_the_result_of_a_gymnasium_reset_is_sb3s_error():
    model = BOOM("MlpPolicy", "Pendulum-v1", **SHORT)
    for who in (model, model.prior):
        with pytest.raises(ValueError, match="mixing Gym API with SB3 VecEnv API"):
            who.predict((OBS, {}))


def test_arguments_in_common_with_sac_have_sacs_order_and_default():
    ours, sacs = (inspect.signature(cls).parameters for cls in (BOOM, SAC))
    assert list(ours)[:7] == [name for name in sacs][:7]
    for name in (
        "learning_rate",
        "buffer_size",
        "train_freq",
        "gradient_steps",
        "action_noise",
        "stats_window_size",
        "verbose",
    ):
        assert ours[name].default == sacs[name].default, name
    assert len(ours) < 43  # as many there were


# ---------------------------------------------------------------- models of earlier versions


def test_archive_and_buffer_of_the_first_format_go_on_as_they_were():
    """Made with defaults of old (the paper's sizes, alignment "release"), ``encoder_lr_scale=0.5`` and ``compile=False``."""
    loaded = BOOM.load(DATA / "boom-0.1.0.zip", env=gym.make("Pendulum-v1"))
    loaded.load_replay_buffer(DATA / "buffer-0.1.0.pkl")
    assert sizes(loaded) == ("paper", "5M", 16, (512, 64, 24, 6))
    assert (loaded.alignment, loaded.policy.encoder_lr_scale, loaded.policy.compile_setting) == ("release", 0.5, False)
    assert loaded.align_scale == "q_scale"  # there was nothing else
    assert loaded.replay_buffer.size() == loaded.num_timesteps == 40
    np.testing.assert_allclose(loaded.prior.predict(OBS, deterministic=True)[0], -0.09543252, atol=1e-5)
    loaded.learn(3, reset_num_timesteps=False)
    assert loaded._n_updates == 26
    encoder, others = loaded.policy.model_optimizer.param_groups
    assert encoder["lr"] == pytest.approx(0.5 * others["lr"])


@pytest.mark.parametrize("name", ["compile", "tf32", "encoder_lr_scale"])
def test_what_changes_no_network_can_be_changed_when_loading(name, tmp_path):
    value = {"compile": "auto", "tf32": False, "encoder_lr_scale": 0.1}[name]
    path = tmp_path / "model.zip"
    BOOM.load(DATA / "boom-0.1.0.zip").save(path)
    for archive in (DATA / "boom-0.1.0.zip", path):
        loaded = BOOM.load(archive, **{name: value})
        assert loaded.policy._constructor_kwargs[name] == value
        assert not hasattr(loaded, name)


# ---------------------------------------------------------------- memory


def test_memory_is_taken_as_the_buffer_fills():
    psutil = pytest.importorskip("psutil")
    space = spaces.Box(0, 255, (84, 84, 1), dtype=np.uint8)
    buffer = sb3_boom.WeightedReplayBuffer(100_000, space, spaces.Box(-1, 1, (1,)), "cpu")
    before = psutil.Process().memory_info().rss
    obs, action = np.zeros((1, *space.shape), np.uint8), np.zeros((1, 1), np.float32)
    for _ in range(5):
        buffer.add(obs, obs, action, np.zeros(1), np.zeros(1, bool), [{}])
    assert psutil.Process().memory_info().rss - before < 50e6  # full, it takes 0.7 GB


def test_a_full_buffer_is_not_copied_when_it_is_loaded():
    buffer = sb3_boom.WeightedReplayBuffer(5, spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (1,)), "cpu")
    obs, action = np.ones((1, 3), np.float32), np.zeros((1, 1), np.float32)
    for _ in range(5):
        buffer.add(obs, obs, action, np.zeros(1), np.zeros(1, bool), [{}])
    state = buffer.__getstate__()
    other = object.__new__(type(buffer))
    other.__setstate__(state)
    assert np.shares_memory(other._storage["steps"].numpy(), state["_storage"]["steps"])


def test_a_buffer_larger_than_the_free_memory_is_warned_about(monkeypatch):
    psutil = pytest.importorskip("psutil")
    free = psutil.virtual_memory()._replace(available=10**9)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.warns(UserWarning, match=r"will take 7.\d+GB, and 1.00GB of memory are free: lower buffer_size, now 1000000"):
        sb3_boom.WeightedReplayBuffer(1_000_000, spaces.Box(0, 255, (84, 84), np.uint8), spaces.Box(-1, 1, (1,)), "cpu")
