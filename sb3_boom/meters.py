"""What is measured between two logs."""

import torch as th


class Meters:
    """Means of losses, which stay on the device until they are logged, and of durations."""

    def __init__(self) -> None:
        self._terms: dict[str, th.Tensor] = {}
        self._n_terms = 0
        self._seconds: dict[str, tuple[float, int]] = {}
        self._started: set[str] = set()

    def add_terms(self, terms: dict[str, th.Tensor]) -> None:
        """
        Count the terms of one update, without host synchronisation.

        :param terms: scalars by name
        """
        if self._terms.keys() != terms.keys():
            self._terms = {name: th.zeros_like(term) for name, term in terms.items()}
            self._n_terms = 0
        th._foreach_add_(list(self._terms.values()), list(terms.values()))
        self._n_terms += 1

    def add_seconds(self, name: str, seconds: float, count: int) -> None:
        """
        Count a duration, but for the first of its kind, which may include compiling.

        :param name: what took the time
        :param seconds: how long
        :param count: how many of it were done meanwhile
        """
        if name not in self._started:
            self._started.add(name)
            return
        total, n = self._seconds.get(name, (0.0, 0))
        self._seconds[name] = (total + seconds, n + count)

    def take_terms(self) -> dict[str, float]:
        """
        :return: means since the last call, by name; empty if there were no updates
        """
        if self._n_terms == 0:
            return {}
        means = (th.stack(list(self._terms.values())) / self._n_terms).tolist()
        names, self._terms, self._n_terms = list(self._terms), {}, 0
        return dict(zip(names, means, strict=True))

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
