"""
What docs/deployment.md says of exported models, measured: equality with torch, returns, speed, deadlines.

    python benchmarks/deployment.py equality --json benchmarks/results/deployment-equality.json
    python benchmarks/deployment.py returns --model MODEL.zip --env Pendulum-v1 --json ...
    python benchmarks/deployment.py speed --json benchmarks/results/deployment-speed.json
    python benchmarks/deployment.py deadline --json benchmarks/results/deployment-deadline.json
"""

from sb3_boom import BOOM  # before torch: see core/processor.py

# isort: split
import argparse
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_boom.benchmark.step import make_model, processor
from sb3_boom.core import planner
from sb3_boom.deployment import Agent
from sb3_boom.deployment.export import export

TOLERANCE = 1e-4  # of actions, in the action space's units
TIE = 1e-3  # of log-weights or values: what rounding may turn round
PLANNER = dict(n_samples=32, n_elites=8, n_policy_samples=4, n_iterations=3)  # of equality alone, where torch takes long


class Layer(BaseFeaturesExtractor):
    """A features extractor of a user's own."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 8)
        self.layer = th.nn.Linear(int(np.prod(observation_space.shape)), 8)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """:param observations: ``[n, ...]`` :return: ``[n, 8]``"""
        return th.tanh(self.layer(observations.flatten(1)))


class RandomEnv(gym.Env):
    """Random observations and rewards of any space; an episode has 50 steps."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Box) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        reward = float(1.0 - np.square(np.asarray(action, np.float64)).mean())
        return self.observation_space.sample(), reward, False, self.steps == 50, {}


ONE = spaces.Box(-1.0, 1.0, (2,), np.float32)
KINDS: dict[str, dict[str, Any]] = {
    "vector": dict(space=spaces.Box(-1.0, 1.0, (5,), np.float32), actions=ONE),
    "vector, VecNormalize, whole actions": dict(
        space=spaces.Box(-9.0, 9.0, (5,), np.float64), actions=spaces.Box(-3, 100, (2,), np.int32), normalize=True
    ),
    "Dict of image, vector, Discrete": dict(
        policy="MultiInputPolicy",
        space=spaces.Dict(
            camera=spaces.Box(0, 255, (36, 36, 3), np.uint8), arm=spaces.Box(-1.0, 1.0, (4,)), mode=spaces.Discrete(3)
        ),
        actions=spaces.Box(-2.0, 2.0, (2, 1), np.float64),
    ),
    "image": dict(policy="CnnPolicy", space=spaces.Box(0, 255, (36, 36, 3), np.uint8), actions=ONE),
    "own features extractor, CEM": dict(
        space=spaces.Box(-1.0, 1.0, (2, 3), np.float32), actions=ONE, extractor=Layer, settings=dict(planner="cem")
    ),
}


def trained(kind: str, steps: int) -> BOOM:
    """:param kind: of observation :param steps: to learn for :return: a small model"""
    case = KINDS[kind]
    env: Any = DummyVecEnv([lambda: RandomEnv(case["space"], case["actions"])])
    env = VecNormalize(env, norm_reward=False) if case.get("normalize") else env
    policy_kwargs: dict[str, Any] = dict(model_size="tiny", compile=False)
    if "extractor" in case:
        policy_kwargs["features_extractor_class"] = case["extractor"]
    model = BOOM(
        case.get("policy", "MlpPolicy"), env, learning_starts=200, pretrain_steps=40, batch_size=64, buffer_size=1000,
        planner_kwargs=PLANNER, policy_kwargs=policy_kwargs, seed=0, device="cpu",
        **case.get("settings", {}),
    )  # fmt: skip
    return model.learn(steps)


class Ties:
    """
    Plans in torch, and how near each decision of them was.

    :param model: whose planner
    :param observations: a batch, as the model sees it
    :param mean: the warm start
    :param noise: of the plan
    """

    def __init__(self, model: BOOM, observations: Any, mean: th.Tensor, noise: planner.PlannerNoise) -> None:
        policy, config = model.policy, model.policy.planner_config
        tensors, _ = policy.obs_to_tensor(observations)
        with th.no_grad():
            z = policy.world_model.encode(policy.features(tensors))
            networks = (policy.world_model, policy.actor, policy.critic, config, z)
            drawn = planner.policy_trajectories(policy.world_model, policy.actor, z, noise.policy)
            mu, std = planner.first_distribution(config, mean)
            self.border = th.full((len(z),), th.inf)  # least gap between the last elite and the best of the others
            for i in range(config.n_iterations):
                sampled = (mu.unsqueeze(2) + std.unsqueeze(2) * noise.candidates[i]).clamp(-1.0, 1.0)
                actions = th.cat([drawn, sampled], dim=2)
                further = (noise.terminal[i], noise.critic_pairs[i], policy.terminations_seen)
                values = planner.trajectory_values(*networks, actions, *further)
                best = values.topk(config.n_elites + 1, dim=1).values
                self.border = self.border.minimum(best[:, -2] - best[:, -1])
                mu, std, first, weights, *_ = planner.refine(*networks, drawn, mu, std, noise.candidates[i], *further)
            self.action = planner.choose(first, weights, noise.elite, mu)
            score = (weights.log() + noise.elite).topk(2, dim=1)
            self.choice = score.values[:, 0] - score.values[:, 1]  # gap between the chosen elite and the next


def equality(args: argparse.Namespace) -> list[dict[str, Any]]:
    """:param args: of the command :return: a row for every kind of observation"""
    rows = []
    for kind in [args.model.stem] if args.model else args.kinds:
        model = BOOM.load(args.model, device="cpu") if args.model else trained(kind, args.steps)
        normalizer = model.get_vec_normalize_env()
        with tempfile.TemporaryDirectory() as folder:
            agent = Agent.load(model.export(pathlib.Path(folder) / "model"))
        space, n = model.observation_space if args.model else KINDS[kind]["space"], args.observations
        space.seed(1)
        samples = [space.sample() for _ in range(n)]
        obs: Any = (
            {k: np.stack([s[k] for s in samples]) for k in samples[0]} if isinstance(samples[0], dict) else np.stack(samples)
        )
        th.manual_seed(1)
        noise, mean = model.policy._noise(n), 0.3 * th.randn(n, model.horizon, model.policy.action_dim)
        ties = Ties(model, obs if normalizer is None else normalizer.normalize_obs(obs), mean, noise)
        names = ("policy", "candidates", "terminal", "elite", "critic_pairs")
        arrays = {name: getattr(noise, name).numpy() for name in names}
        action, _, _ = agent.plan(obs, mean.numpy(), arrays)
        wanted = model.policy.to_action_space(ties.action.numpy())
        gap = np.abs(action.astype(np.float64) - wanted).reshape(n, -1).max(axis=1)
        equal = gap <= TOLERANCE
        box = model.action_space
        assert isinstance(box, spaces.Box)
        part = 0.5 * (ties.action.numpy().reshape(-1, *box.shape).astype(np.float64) + 1.0)
        exact = box.low + part * (box.high.astype(np.float64) - box.low)
        from_half = np.abs(exact - np.floor(exact) - 0.5).reshape(n, -1).min(axis=1)
        halves = np.issubdtype(box.dtype, np.integer) & (from_half < TIE) & ~equal
        choice, border = (ties.choice.numpy() < TIE) & ~equal, (ties.border.numpy() < TIE) & ~equal
        rows.append(
            dict(
                kind=kind,
                observations=n,
                equal=int(equal.sum()),
                largest_difference_of_equal=float(gap[equal].max()),
                ties_of_the_chosen_elite=int(choice.sum()),
                ties_at_the_elites_border=int((border & ~choice).sum()),
                whole_numbers_rounded_the_other_way=int((halves & ~choice & ~border).sum()),
                neither=int((~equal & ~choice & ~border & ~halves).sum()),
            )
        )
        print(rows[-1], flush=True)
    return rows


def returns(args: argparse.Namespace) -> list[dict[str, Any]]:
    """:param args: of the command :return: returns of the model and of its export"""
    rows = []
    env: Any = make_vec_env(args.env, n_envs=args.n_envs, seed=1000)
    raw: Any = make_vec_env(args.env, n_envs=args.n_envs, seed=1000)
    if args.vec_normalize:
        env = VecNormalize.load(str(args.vec_normalize), env)
        env.training = env.norm_reward = False
    model = BOOM.load(args.model, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        normalizer = env if args.vec_normalize else None
        agent = Agent.load(export(model, pathlib.Path(folder) / "model", normalizer=normalizer))
    for name, of, where in (("torch", model, env), ("export", agent, raw)):
        for part, policy in (("planner", of), ("prior", model.prior if of is model else Prior(agent))):
            found, _ = evaluate_policy(policy, where, args.episodes, return_episode_rewards=True, warn=False)
            row = dict(
                env=args.env, what=name, part=part, mean=np.mean(found), std=np.std(found, ddof=1), episodes=args.episodes
            )
            rows.append({key: round(float(value), 2) if isinstance(value, float) else value for key, value in row.items()})
            print(rows[-1], flush=True)
    return rows


class Prior:
    """An agent's prior as ``evaluate_policy`` takes it. :param agent: the agent"""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    def predict(self, observation: Any, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
        """:param observation: a batch :return: actions, and no state"""
        return self.agent.prior(observation), None


def timed(function: Callable[[], object], n: int) -> dict[str, float]:
    """:param function: called ``n`` times, after a tenth of that :param n: calls :return: milliseconds"""
    for _ in range(max(n // 10, 2)):
        function()
    times, processor_times = [], []
    for _ in range(n):
        start, processor_start = time.perf_counter(), time.process_time()
        function()
        times.append(time.perf_counter() - start)
        processor_times.append(time.process_time() - processor_start)
    found = dict(median_ms=np.median(times), p99_ms=np.quantile(times, 0.99), least_ms=min(times), most_ms=max(times))
    found |= dict(cpu_ms=np.median(processor_times))  # of all threads, without what others took of the processor
    return {name: round(1e3 * float(value), 3) for name, value in found.items()}


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """:param args: of the command :return: a row for every size, number of threads, and part"""
    rows = []
    for size in args.sizes:
        model = make_model(size, 1, compile=True, device="cpu", changes={})
        with th.no_grad():  # no head of zeros, and the termination head at work
            for parameter in model.policy.critic.parameters():
                parameter.add_(0.02 * th.randn_like(parameter))
            model.policy.terminations_seen.fill_(1.0)  # and yet the mean of two critics after a plan, as without falls
        with tempfile.TemporaryDirectory() as folder:
            path = model.export(pathlib.Path(folder) / size)
            megabytes = round(path.stat().st_size / 2**20, 2)
            obs = model.observation_space.sample()
            calls = args.calls if size == "tiny" else max(args.calls // 25, 20)
            for threads in args.threads:
                agent = Agent.load(path, threads=threads)
                th.set_num_threads(threads)
                state = model.predict(obs)[1]
                parts: dict[tuple[str, str], Callable[[], object]] = {
                    ("onnxruntime", "planner"): partial(agent, obs),
                    ("onnxruntime", "prior"): partial(agent.prior, obs),
                    ("torch", "planner"): partial(model.predict, obs, state),
                    ("torch", "prior"): partial(model.prior.predict, obs, deterministic=True),
                }
                for (runner, part), function in parts.items():
                    rows.append(dict(size=size, megabytes=megabytes, threads=threads, runner=runner, part=part))
                    n = 10 * calls if part == "prior" and runner == "onnxruntime" else calls
                    rows[-1].update(timed(function, n), calls=n, load_average=round(os.getloadavg()[0], 2))
                    print(rows[-1], flush=True)
    return rows


def burn(stop: Any) -> None:
    """:param stop: an event: keep a core busy until it is set"""
    while not stop.is_set():
        sum(i * i for i in range(10_000))


def deadline(args: argparse.Namespace) -> list[dict[str, Any]]:
    """:param args: of the command :return: a row for every deadline, with and without a process that keeps a core busy"""
    rows = []
    model = make_model("tiny", 1, compile=False, device="cpu", changes={})
    with tempfile.TemporaryDirectory() as folder:
        path = model.export(pathlib.Path(folder) / "tiny")
        for busy in (0, 1):
            spawn = multiprocessing.get_context("spawn")
            stop = spawn.Event()
            workers = [spawn.Process(target=burn, args=(stop,)) for _ in range(busy)]
            for worker in workers:
                worker.start()
            for milliseconds in args.deadlines:
                agent = Agent.load(path, deadline_ms=milliseconds)
                obs = model.observation_space.sample()
                took, done = [], []
                for _ in range(args.calls):
                    start = time.perf_counter()
                    agent(obs)
                    took.append(1e3 * (time.perf_counter() - start))
                    done.append(agent.iterations_done)
                kept = float(np.mean(np.array(took) <= milliseconds))
                counts = {str(i): done.count(i) for i in sorted(set(done))}
                rows.append(dict(deadline_ms=milliseconds, busy_cores=busy, kept=kept, iterations=counts, calls=args.calls))
                rows[-1].update(
                    median_ms=round(float(np.median(took)), 2), p99_ms=round(float(np.quantile(took, 0.99)), 2),
                    most_ms=round(max(took), 2), load_average=round(os.getloadavg()[0], 2),
                )  # fmt: skip
                print(rows[-1], flush=True)
            stop.set()
            for worker in workers:
                worker.join()
    return rows


def main() -> None:
    """The command."""
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adders = {name: commands.add_parser(name) for name in ("equality", "returns", "speed", "deadline")}
    adders["equality"].add_argument("--observations", type=int, default=1000)
    adders["equality"].add_argument("--model", type=pathlib.Path, help="a trained one, instead of those of the kinds")
    adders["equality"].add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    adders["equality"].add_argument("--steps", type=int, default=220)
    adders["returns"].add_argument("--model", type=pathlib.Path, required=True)
    adders["returns"].add_argument("--env", required=True)
    adders["returns"].add_argument("--vec-normalize", type=pathlib.Path)
    adders["returns"].add_argument("--episodes", type=int, default=20)
    adders["returns"].add_argument("--n-envs", type=int, default=10)
    adders["speed"].add_argument("--sizes", nargs="+", default=["tiny", "1M", "5M"])
    adders["speed"].add_argument("--threads", nargs="+", type=int, default=[1, 2])
    adders["speed"].add_argument("--calls", type=int, default=1000)
    adders["deadline"].add_argument("--deadlines", nargs="+", type=float, default=[5.0, 10.0, 20.0])
    adders["deadline"].add_argument("--calls", type=int, default=1000)
    for adder in adders.values():
        adder.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    th.set_num_threads(1)
    load = os.getloadavg()[0]
    rows = dict(equality=equality, returns=returns, speed=speed, deadline=deadline)[args.command](args)
    machine = dict(
        processor=processor(), cores=os.cpu_count(), torch=th.__version__, onnxruntime=onnxruntime.__version__,
        numpy=np.__version__, load_average_before=round(load, 2), load_average_after=round(os.getloadavg()[0], 2),
    )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(dict(machine=machine, rows=rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
