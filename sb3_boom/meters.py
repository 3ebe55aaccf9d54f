"""What is measured between two logs."""

import torch as th

from sb3_boom.core.losses import termination_scores


class Meters:
    """Means of losses, which stay on the device until they are logged, and of durations."""

    def __init__(self) -> None:
        self._terms: dict[str, th.Tensor] = {}
        self._seconds: dict[str, tuple[float, int]] = {}
        self._started: set[str] = set()
        self._counts: dict[str, float] = {}
        self.n_updates = 0  # since the losses were last taken

    def add_terms(self, terms: dict[str, th.Tensor]) -> None:
        """
        Count the terms of one update, without host synchronisation.

        :param terms: scalars by name
        """
        if self._terms.keys() != terms.keys():
            self._terms = {name: th.zeros_like(term) for name, term in terms.items()}
            self.n_updates = 0
        th._foreach_add_(list(self._terms.values()), list(terms.values()))
        self.n_updates += 1

    def take_terms(self) -> dict[str, float]:
        """
        Waits for the device.

        :return: means since the last call, by name; empty if there were no updates
        """
        if self.n_updates == 0:
            return {}
        sums = dict(zip(self._terms, th.stack(list(self._terms.values())).tolist(), strict=True))
        means = {name: value / self.n_updates for name, value in sums.items()}
        for name in [name for name in means if name.startswith("terminations_")]:
            self._counts[name] = self._counts.get(name, 0.0) + sums[name]
            del means[name]
        self._terms, self.n_updates = {}, 0
        return means

    def termination_scores(self) -> dict[str, float]:
        """
        :return: precision and recall of terminations among what was taken since :meth:`forget_counts`
        """
        return termination_scores(dict(self._counts))

    def forget_counts(self) -> None:
        """Count precision and recall of terminations anew."""
        self._counts = {}

    def add_seconds(self, name: str, seconds: float, count: int) -> None:
        """
        Count a duration, except the first of its kind, which may include compiling.

        :param name: what took the time
        :param seconds: how long
        :param count: how many of it were done meanwhile
        """
        if name not in self._started:
            self._started.add(name)
            return
        total, n = self._seconds.get(name, (0.0, 0))
        self._seconds[name] = (total + seconds, n + count)

    def milliseconds(self) -> dict[str, float]:
        """
        :return: mean durations so far, by name
        """
        return {name: 1000.0 * total / n for name, (total, n) in self._seconds.items()}

    def take_milliseconds(self) -> dict[str, float]:
        """
        :return: mean durations since the last call, by name
        """
        means, self._seconds = self.milliseconds(), {}
        return means
