"""Reinforcement-learning actors that share one observation normalizer, compared with actors that each have their own.

    python examples/reinforcement.py --plot docs/reinforcement.png

Each actor is a process that plays its own copy of a small environment with its own policy, and so sees different
observations. With its own normalizer (running mean and variance, as VecNormalize keeps them) each process ends with
different statistics, and normalizes the same observation differently. With the service, all actors fold into one
population layer and share one state: mean and variance of all observations.

Give a policy observations that are normalized by these running statistics: `fold_moments`, then `eval_local` (or
`eval`). The output of `train` is normalized by the batch's own statistics: the mean of each rollout becomes 0, and a
cart that stays on the left looks like one that stays on the right.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from server import server

from batchnorm_client import Client

ACTORS = 4
ROLLOUT = 32  # steps between two folds
NAMES = ("position", "velocity", "temperature")
EPS, CLIP = 1e-8, 10.0
PROMISED = 1e-9


class Cart:
    """A cart on a spring, pushed left or right; its motor warms up. Observation: position, velocity, temperature."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._position, self._velocity, self._heat = self._rng.normal(0, 0.1), 0.0, 20.0

    def step(self, push: float) -> np.ndarray:
        """The observation after a push, and some wind."""
        force = push - 0.5 * self._position - 0.2 * self._velocity + self._rng.normal(0, 0.3)
        self._velocity += 0.1 * force
        self._position += 0.1 * self._velocity
        self._heat += 0.05 * abs(push) - 0.01 * (self._heat - 20)
        return np.array([self._position, self._velocity, self._heat])


def policy(actor: int, step: int) -> float:
    """Pushes: to one side, to the other, in turns, or hardly."""
    return (3.0, -3.0, 4.0 if step // 20 % 2 else -4.0, 0.2)[actor % 4]


@dataclass
class Report:
    """The results of an actor.

    Attributes:
        observations: all observations, (steps, 3).
        private: mean and variance of its own normalizer.
        seen: one observation, normalized by the shared and by its own normalizer, (2, 3).
        means: of its own normalizer after each rollout, (rollouts, 3).
        running: its last rollout, normalized by the shared running statistics, (ROLLOUT, 3).
        batch: the same by the rollout's own statistics, as `train` would return it, (ROLLOUT, 3).
    """

    observations: np.ndarray
    private: tuple[np.ndarray, np.ndarray]
    seen: np.ndarray
    means: np.ndarray
    running: np.ndarray
    batch: np.ndarray


class Private:
    """A normalizer of one process, with VecNormalize's update."""

    def __init__(self) -> None:
        self.count, self.mean, self.var = 1e-4, np.zeros(3), np.ones(3)

    def fold(self, batch: np.ndarray) -> None:
        """Chan's merge, as in Stable-Baselines3's RunningMeanStd."""
        gap, total = batch.mean(0) - self.mean, self.count + len(batch)
        m2 = self.var * self.count + batch.var(0) * len(batch) + gap**2 * self.count * len(batch) / total
        self.mean, self.var, self.count = self.mean + gap * len(batch) / total, m2 / total, total

    def normalize(self, batch: np.ndarray) -> np.ndarray:
        """Normalize and clip."""
        return np.clip((batch - self.mean) / np.sqrt(self.var + EPS), -CLIP, CLIP)


def act(url: str, actor: int, rollouts: int, barrier: multiprocessing.synchronize.Barrier, reports) -> None:
    """One process: play, fold, normalize; then normalize one observation with both normalizers."""
    cart, private, played, means = Cart(actor), Private(), [], []
    with Client(url) as client:
        shared = client.layer("observations")
        for rollout in range(rollouts):
            batch = np.array([cart.step(policy(actor, rollout * ROLLOUT + step)) for step in range(ROLLOUT)])
            played.append(batch)
            shared.fold_moments(len(batch), batch.mean(0), batch.var(0))
            running = shared.eval_local(batch).output  # the input of a policy
            private.fold(batch)
            means.append(private.mean)
        barrier.wait()  # from here on no actor folds
        probe = np.array([[1.0, 1.0, 25.0]])
        seen = np.concatenate([shared.eval_local(probe).output, private.normalize(probe)])
        own = (batch - batch.mean(0)) / np.sqrt(batch.var(0) + EPS)
        report = Report(np.concatenate(played), (private.mean, private.var), seen, np.array(means), running, own)
        reports.put((actor, report))


def play(url: str, rollouts: int) -> tuple[dict[int, Report], dict[str, np.ndarray]]:
    """Every actor's report, and the shared state at the end."""
    context = multiprocessing.get_context("spawn")
    barrier, reports = context.Barrier(ACTORS), context.Queue()
    with Client(url) as client:
        layer = client.create_layer(
            "observations", 3, statistics="population", dtype="float64", affine=False, eps=EPS, clip=CLIP
        )
        actors = [context.Process(target=act, args=(url, i, rollouts, barrier, reports)) for i in range(ACTORS)]
        for process in actors:
            process.start()
        found = dict(reports.get(timeout=100) for _ in actors)
        for process in actors:
            process.join()
        return found, layer.state_dict()


def drift(report: Report, state: dict[str, np.ndarray]) -> np.ndarray:
    """Distance of an actor's own mean from the final shared mean, in standard deviations, after each rollout."""
    return np.abs((report.means - state["running_mean"]) / np.sqrt(state["running_var"])).max(1)


def plot(found: dict[int, Report], state: dict[str, np.ndarray], path: Path) -> None:
    """Draw the drift of private means, one observation as the actors see it, and the output of `train`."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - imported only for a picture

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colors = ("#f2a65a", "#c8553d", "#588157", "#6d6875")
    for actor in sorted(found):
        left.plot(
            range(1, len(found[actor].means) + 1),
            drift(found[actor], state),
            color=colors[actor],
            label=f"actor {actor}",
        )
    left.axhline(0, color="#1b3a5c", linewidth=2, label="through the service")
    left.set_xlabel(f"rollouts of {ROLLOUT} steps")
    left.set_ylabel("distance from the shared mean, in std")
    left.set_title("private means do not come together", fontsize=11)
    places = np.arange(len(NAMES))
    for actor in sorted(found):
        middle.bar(
            places + 0.16 * (actor - 2), found[actor].seen[1], 0.16, color=colors[actor], label=f"actor {actor}'s own"
        )
    middle.bar(places + 0.16 * 2, found[0].seen[0], 0.16, color="#1b3a5c", label="shared, for all actors")
    middle.axhline(0, color="#444444", linewidth=0.8)
    middle.set_xticks(places, NAMES)
    middle.set_ylabel("normalized value")
    middle.set_title("one observation, as each actor sees it", fontsize=11)
    for actor, side in ((0, "pushed right"), (1, "pushed left")):
        color = colors[actor]
        right.plot(found[actor].running[:, 0], color=color, linewidth=2, label=f"{side}, by running statistics")
        right.plot(found[actor].batch[:, 0], color=color, linestyle=":", label=f"{side}, by its own batch")
    right.set_xlabel("step of the last rollout")
    right.set_ylabel("normalized position")
    right.set_title("a batch's own statistics hide the side", fontsize=11)
    for axis in (left, middle, right):
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.08))
    middle.legend(frameon=False, fontsize=8, loc="lower center")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None}, pil_kwargs={"optimize": True})


def main() -> int:
    """Play, compare, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rollouts", type=int, default=60, help="of each actor (default 60)")
    parser.add_argument("--plot", type=Path, help="where to save the picture, a PNG file")
    arguments = parser.parse_args()
    with server() as url:
        found, state = play(url, arguments.rollouts)
    everything = np.concatenate([found[actor].observations for actor in sorted(found)])
    print(f"{ACTORS} actors, {len(everything)} observations; mean and standard deviation of {', '.join(NAMES)}")
    rows = {f"actor {i}, its own": found[i].private for i in sorted(found)}
    rows["all observations"] = (everything.mean(0), everything.var(0, ddof=1))
    rows["the shared state"] = (state["running_mean"], state["running_var"])
    for name, (mean, var) in rows.items():
        pairs = "   ".join(f"{m:8.3f} +- {s:6.3f}" for m, s in zip(mean, np.sqrt(var), strict=True))
        print(f"  {name:18} {pairs}")
    errors = [
        np.abs(ours / theirs - 1).max()
        for ours, theirs in zip(rows["the shared state"], rows["all observations"], strict=True)
    ]
    agree = all(np.array_equal(found[i].seen[0], found[0].seen[0]) for i in found)
    off = max(drift(found[i], state)[-1] for i in found)
    print(f"the shared state differs from all observations by {max(errors):.1e}, relatively")
    print(f"the actors see one observation alike: {agree}; a private mean is up to {off:.2f} standard deviations off")
    for way in ("running", "batch"):
        sides = [getattr(found[actor], way)[:, 0].mean() for actor in (0, 1)]
        print(
            f"mean position of the last rollout, by {way} statistics: pushed right {sides[0]:.2f}, left {sides[1]:.2f}"
        )
    if arguments.plot:
        plot(found, state, arguments.plot)
        print(f"the picture is in {arguments.plot}")
    kept = max(errors) <= PROMISED and agree and int(state["samples_tracked"]) == len(everything)
    print("The actors share one state." if kept else "The actors do NOT share one state.")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
