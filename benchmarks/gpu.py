"""
What a step costs on a GPU, and whether CUDA graphs change a number: `make gpu OUT=folder`.

    python benchmarks/gpu.py --out folder [--seconds 300] [--parts 5M-0 5M-1]

Every part is a process of its own, so that all compile at the same time and one failure leaves the others alone. Who has
compiled asks to measure; the others are stopped meanwhile. `gpu.json` is written anew after each part, with what failed.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# by importance; a size, one of OPTIONS, and the environments planned for at once, 0 being an update
PARTS = [
    "5M-0", "5M-1", "5M+bf16-1", "5M+unaligned-1", "smoke-tiny", "tests", "5M-16", "5M-8", "smoke-5M",
    "tiny-0", "tiny-1", "1M-0", "1M-1", "1M+bf16-1", "5M+bf16-16", "tiny-16", "1M-16", "tiny-8", "1M-8",
]  # fmt: skip
OPTIONS = ("", "bf16", "unaligned")  # plans with bfloat16 products; without zeros behind the rows of their factors
WITH_LOOP = ("5M-1", "tiny-1")  # whose updates another part has put into the compiler's cache
N_FIRST_CLASS = 5  # parts that compile before the others
DEVICE = os.environ.get("SB3_BOOM_DEVICE", "cuda")  # "cpu" to rehearse
CALLS = 100
IN_A_ROW = 200
LOOP_STEPS = 300
SMOKE_STEPS = 300
GOALS = {"plan_ms": 2.0, "update_ms": 2.0, "plan_16_by_1": 4.0, "loop_ms": 0.5}


class Part:
    """
    What one process notes.

    :param name: of :data:`PARTS`
    :param path: its JSON
    """

    def __init__(self, name: str, path: pathlib.Path) -> None:
        self.name = name
        self.path = path
        self.results: dict[str, Any] = {}
        self.start = time.perf_counter()

    def note(self, **values: Any) -> None:
        """:param values: to be written at once"""
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        self.results.update(rounded, seconds=round(time.perf_counter() - self.start, 1))
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.results, indent=1, default=str))
        temporary.replace(self.path)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """
        Go on after a failure, which is noted.

        :param name: of what is done meanwhile
        """
        try:
            yield
        except Exception:
            self.note(**{f"{name}_error": traceback.format_exc()})

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Have the other processes stopped meanwhile."""
        print("READY", flush=True)
        sys.stdin.readline()
        try:
            yield
        finally:
            print("DONE", flush=True)


def wait_for_gpu() -> None:
    """Until all that was launched is done."""
    import torch as th

    if DEVICE == "cuda":
        th.cuda.synchronize()


def milliseconds(function: Callable[[], object], n: int) -> tuple[float, float]:
    """
    :param function: works on the GPU
    :param n: times to call it
    :return: medians until the work is done, and until it is launched
    """
    import numpy as np

    times = []
    for _ in range(n):
        wait_for_gpu()
        start = time.perf_counter()
        function()
        launched = time.perf_counter()
        wait_for_gpu()
        times.append((time.perf_counter() - start, launched - start))
    done, launched = 1e3 * np.median(times, axis=0)
    return float(done), float(launched)


def milliseconds_in_a_row(function: Callable[[], object], n: int) -> float:
    """
    :param function: works on the GPU
    :param n: times to call it without waiting, and again, when the clock has risen
    :return: of one of them
    """
    for _ in range(2):
        wait_for_gpu()
        start = time.perf_counter()
        for _ in range(n):
            function()
        wait_for_gpu()
    return 1e3 * (time.perf_counter() - start) / n


def state_of(policy: Any) -> list[Any]:
    """
    :param policy: the networks
    :return: all tensors that an update changes
    """
    states = [state for optimizer in (policy.model_optimizer, policy.actor_optimizer) for state in optimizer.state.values()]
    return [*policy.parameters(), policy.q_scale, policy.terminations_seen, *(t for state in states for t in state.values())]


def differences(model: Any, obs: Any, mean: Any, updates: bool) -> dict[str, float]:
    """
    :param model: a BOOM whose graphs are captured
    :param obs: observations to plan from
    :param mean: warm start
    :param updates: whether to compare updates instead of plans
    :return: largest differences between captured and launched kernels, of three plans or updates; how far the latter move
    """
    import torch as th

    policy, results = model.policy, []
    before = [tensor.detach().clone() for tensor in state_of(policy)]
    for capture in (True, False):
        policy.capture = capture
        th.manual_seed(1)
        if updates:
            model.train(3, model.batch_size)
            results.append([parameter.detach().clone() for parameter in policy.parameters()])
            with th.no_grad():
                for tensor, was in zip(state_of(policy), before, strict=True):
                    tensor.copy_(was)
        else:
            results.append([policy.plan(obs, mean).mean for _ in range(3)])
    policy.capture = True

    def largest(a: list[Any], b: list[Any]) -> float:
        return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))

    found = {"difference": largest(*results)}
    if updates:
        found["moves"] = largest(results[0], before[: len(results[0])])
    return found


def settings(size: str, option: str = "") -> dict[str, Any]:
    """
    :param size: of the model
    :param option: of :data:`OPTIONS`
    :return: BOOM's settings, "tiny" with the preset for a CPU, which a GPU may run too
    """
    policy_kwargs = dict(model_size=size, bf16=option == "bf16")
    return dict(preset="cpu" if size == "tiny" else "paper", policy_kwargs=policy_kwargs, device=DEVICE, seed=0)


def bench(part: Part, size: str, option: str, n_envs: int) -> None:
    """
    :param part: where to note
    :param size: of the model
    :param option: of :data:`OPTIONS`
    :param n_envs: environments planned for at once; 0 for an update instead
    """
    import torch as th
    from stable_baselines3.common.env_util import make_vec_env

    from sb3_boom import BOOM
    from sb3_boom.benchmark.step import PROBLEMS, MatrixProducts, RandomEnv
    from sb3_boom.core import torch_layers

    if option == "unaligned":
        torch_layers.ALIGNMENT = 1
    env = make_vec_env(lambda: RandomEnv(*PROBLEMS[size]), n_envs=max(n_envs, 1))
    model = BOOM("MlpPolicy", env, learning_starts=1000, pretrain_steps=0, buffer_size=50_000, **settings(size, option))
    model.gradient_steps = 0
    model.learn(1000)  # fills the buffer, at random
    policy = model.policy
    assert model._last_obs is not None
    obs, _ = policy.obs_to_tensor(model._last_obs)
    mean = policy.initial_mean(len(obs))

    def plan() -> object:
        return policy.plan(obs, mean)

    def update() -> None:
        model.train(1, model.batch_size)

    name, work = ("plan", plan) if n_envs else ("update", update)
    setting = policy.compile_setting
    policy.compile_setting = False  # the dispatcher sees the eager program's products
    with MatrixProducts() as products:
        work()
    policy.compile_setting = setting
    part.note(**{f"{name}_gflop": products.gflop}, prepared_s=time.perf_counter() - part.start)
    start = time.perf_counter()
    work()
    wait_for_gpu()
    part.note(**{f"{name}_first_s": time.perf_counter() - start})
    for _ in range(6):  # three more calls before the capture
        work()
    wait_for_gpu()
    part.note(captured=model.policy.graphs.counts(), compiles=policy.compiler.__name__)
    with part.alone():
        with part.step(name):
            done, launched = milliseconds(work, CALLS)
            part.note(**{f"{name}_ms": done, f"{name}_launch_ms": launched})
        with part.step("in_a_row"):
            part.note(**{f"{name}_in_a_row_ms": milliseconds_in_a_row(work, IN_A_ROW)})
        with part.step("floor"):
            done, _ = milliseconds(products.alone(model.device), CALLS // 4)
            part.note(**{f"{name}_products_ms": done})
        with part.step("without_graph"):
            policy.capture = False
            for _ in range(5):
                work()
            done, launched = milliseconds(work, CALLS // 4)
            part.note(**{f"{name}_without_graph_ms": done, f"{name}_without_graph_launch_ms": launched})
    policy.capture = True
    with part.step("equality"):
        part.note(**differences(model, obs, mean, updates=n_envs == 0))
    if part.name in WITH_LOOP:
        with part.step("loop"):
            for _ in range(7):
                update()
            wait_for_gpu()
            with part.alone():
                part.note(**loop(model))
    part.note(
        captured=model.policy.graphs.counts(), peak_gpu_mb=th.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else None
    )


def loop(model: Any) -> dict[str, float]:
    """
    :param model: a BOOM that has compiled
    :return: what a step of `learn` costs besides plan and update, whose GPU work is measured by events
    """
    model.gradient_steps = 1
    model.learn(20, reset_num_timesteps=False)
    model.meters.take_milliseconds()
    wait_for_gpu()
    start = time.perf_counter()
    model.learn(LOOP_STEPS, reset_num_timesteps=False)
    wait_for_gpu()
    step = 1e3 * (time.perf_counter() - start) / LOOP_STEPS
    inside = model.meters.take_milliseconds()
    return {
        "step_ms": step, "meter_plan_ms": inside["plan"], "meter_update_ms": inside["update"],
        "loop_ms": step - inside["plan"] - inside["update"],
    }  # fmt: skip


def smoke(part: Part, size: str) -> None:
    """
    Train, save, go on on a CPU and come back.

    :param part: where to note
    :param size: of the model
    """
    import gymnasium as gym
    import numpy as np
    import torch as th
    from stable_baselines3.common.evaluation import evaluate_policy

    from sb3_boom import BOOM

    model = BOOM("MlpPolicy", "Pendulum-v1", learning_starts=100, pretrain_steps=20, **settings(size))
    start = time.perf_counter()
    model.learn(SMOKE_STEPS, log_interval=1)
    part.note(train_s=time.perf_counter() - start, updates=model._n_updates, captured=model.policy.graphs.counts())
    names = [name for name, parameter in model.policy.named_parameters() if not bool(th.isfinite(parameter).all())]
    part.note(not_finite=names, q_scale=float(model.policy.q_scale), milliseconds=model.meters.milliseconds())
    with part.step("evaluate"):
        mean, _ = evaluate_policy(model, gym.make("Pendulum-v1"), n_eval_episodes=1)
        part.note(return_of_one_episode=mean)
    with part.step("devices"):
        obs = np.array([[1.0, 0.0, 0.0]], np.float32)
        with tempfile.TemporaryDirectory() as folder:
            model.save(f"{folder}/model")
            there = BOOM.load(f"{folder}/model", env=gym.make("Pendulum-v1"), device="cpu") if size == "tiny" else None
            back = BOOM.load(f"{folder}/model", env=gym.make("Pendulum-v1"), device=DEVICE)
        actions = [m.predict(obs, deterministic=True)[0].tolist() for m in (model, back)]
        part.note(action_before_and_after_loading=actions)
        back.learn(130)
        part.note(captured_after_loading=back.policy.graphs.counts())
        if there is not None:
            there.learn(110)
            part.note(lr_on_cpu=str(there.policy.model_optimizer.param_groups[0]["lr"]))


def run_tests(part: Part) -> None:
    """:param part: where to note"""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=long", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    output = done.stdout.strip() if done.returncode else done.stdout.strip().rpartition("\n")[2]
    part.note(rc=done.returncode, output=output[-12_000:], errors=done.stderr[-3000:])


def work_on(name: str, folder: pathlib.Path) -> None:
    """
    A part's process.

    :param name: of :data:`PARTS`
    :param folder: for its JSON
    """
    part = Part(name, folder / f"{name}.json")
    if PARTS.index(name) >= N_FIRST_CLASS:
        os.nice(10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            kind, _, size = name.partition("-")
            if kind == "tests":
                run_tests(part)
            elif kind == "smoke":
                smoke(part, size)
            else:
                kind, _, option = kind.partition("+")
                bench(part, kind, option, int(size))
        except BaseException:
            part.note(error=traceback.format_exc())
    told = {str(warning.message)[:500] for warning in caught if "BOOM" in str(warning.message)}
    part.note(warnings=sorted(told), finished=True)


class Child:
    """
    A part's process, seen from outside.

    :param name: of :data:`PARTS`
    :param folder: for its JSON and log
    :param events: where it is noted what the process says
    """

    def __init__(self, name: str, folder: pathlib.Path, events: queue.Queue) -> None:
        self.name = name
        self.folder = folder
        command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--part", name, "--out", str(folder)]
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4",
        }  # fmt: skip
        self.log = open(folder / f"{name}.log", "w")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, start_new_session=True,
            env=environment,
        )  # fmt: skip
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.Queue) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() in ("READY", "DONE"):
                events.put((self.name, line.strip()))
        self.process.wait()
        events.put((self.name, "EXIT"))

    def send(self, number: int) -> None:
        """:param number: of the signal, for the process and those it started"""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def go(self) -> None:
        """Let it measure."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write("GO\n")
            self.process.stdin.flush()

    def results(self) -> dict[str, Any]:
        """:return: what it has noted; the end of its log, if it has not finished"""
        path = self.folder / f"{self.name}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        if not results.pop("finished", False) or any("error" in key for key in results):
            results["log"] = (self.folder / f"{self.name}.log").read_text()[-4000:]
        return results


def machine() -> dict[str, Any]:
    """:return: what the numbers were measured on"""
    import torch as th

    gpu = th.cuda.get_device_name() if th.cuda.is_available() else None
    return dict(
        gpu=gpu, torch=th.__version__, cuda=th.version.cuda, python=platform.python_version(), cores=os.cpu_count(),
        load_average=os.getloadavg()[0],
    )  # fmt: skip


def goals(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """
    :param parts: results by name
    :return: what was to be reached at 5M, and what was
    """
    one, sixteen = parts.get("5M-1", {}), parts.get("5M-16", {})
    met = {**{name: one.get(name) for name in ("plan_ms", "loop_ms")}, "update_ms": parts.get("5M-0", {}).get("update_ms")}
    if "plan_ms" in one and "plan_ms" in sixteen:
        met["plan_16_by_1"] = sixteen["plan_ms"] / one["plan_ms"]
    return {name: dict(goal=goal, met=met.get(name)) for name, goal in GOALS.items()}


def orchestrate(names: list[str], out: pathlib.Path, seconds: float) -> None:
    """
    :param names: of :data:`PARTS`
    :param out: folder for ``gpu.json``
    :param seconds: after which everything is stopped
    """
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    events: queue.Queue = queue.Queue()
    with tempfile.TemporaryDirectory() as temporary:
        children = {name: Child(name, pathlib.Path(temporary), events) for name in names}
        about = machine()
        running, waiting, measuring = set(names), set(), None

        def write() -> None:
            parts = {name: child.results() for name, child in children.items()}
            text = json.dumps(dict(machine=about, goals=goals(parts), unfinished=sorted(running), parts=parts), indent=1)
            (out / "gpu.json").write_text(text + "\n")

        try:
            while running and (left := seconds - (time.monotonic() - start)) > 0:
                with contextlib.suppress(queue.Empty):
                    name, event = events.get(timeout=min(left, 5.0))
                    print(f"{time.monotonic() - start:6.1f} s  {name:13} {event}", flush=True)
                    if event == "READY":
                        waiting.add(name)
                    elif event == "EXIT":
                        running.discard(name)
                        waiting.discard(name)
                    if measuring == name and event != "READY":
                        measuring = None
                        for other in running - {name}:
                            children[other].send(signal.SIGCONT)
                if measuring is None and waiting:
                    measuring = min(waiting, key=PARTS.index)
                    waiting.discard(measuring)
                    for other in running - {measuring}:
                        children[other].send(signal.SIGSTOP)
                    time.sleep(0.3)  # what they have launched ends
                    children[measuring].go()
                write()
        finally:
            for child in children.values():
                child.send(signal.SIGKILL)
            write()
    report = json.loads((out / "gpu.json").read_text())
    print(json.dumps(dict(machine=report["machine"], goals=report["goals"], unfinished=report["unfinished"]), indent=1))
    for name, results in report["parts"].items():
        short = {key: value for key, value in results.items() if key not in ("log", "output") and "error" not in key}
        print(name, json.dumps(short))
        for key, value in results.items():
            if "error" in key and value:
                print(f"  {key}: {value.strip().splitlines()[-1]}")


def main() -> None:
    """Run all parts, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for gpu.json")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which what is not measured is left out")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        work_on(args.part, args.out)
    else:
        orchestrate(args.parts, args.out, args.seconds)


if __name__ == "__main__":
    main()
