"""Owns what GPUs cost: GPU-seconds and, at a price of a GPU and hour, money in whatever currency that is."""

from dataclasses import dataclass

_SECONDS_OF_AN_HOUR = 3600


@dataclass(frozen=True)
class Cost:
    """Holds GPU-seconds, each GPU counted as a whole, and the price of a GPU and hour, if that is known."""

    gpu_seconds: float
    price_per_gpu_hour: float | None = None

    @property
    def money(self) -> float | None:
        """Return what they cost; None without a price."""
        price = self.price_per_gpu_hour
        return None if price is None else self.gpu_seconds * price / _SECONDS_OF_AN_HOUR

    @property
    def words(self) -> str:
        """Write GPU-seconds and, with a price, money."""
        money = "" if self.money is None else f" ({in_money(self.money)})"
        return f"{self.gpu_seconds:.0f} GPU-seconds{money}"


@dataclass(frozen=True)
class Costs:
    """Holds what work on GPUs has cost, and what it was expected to, at one price."""

    measured: Cost
    planned: Cost

    @property
    def figures(self) -> dict[str, float]:
        """Return the figures by name; those of money with a price."""
        found = {
            "gpu_seconds": self.measured.gpu_seconds,
            "planned_gpu_seconds": self.planned.gpu_seconds,
            "money": self.measured.money,
            "planned_money": self.planned.money,
        }
        return {name: round(value, 6) for name, value in found.items() if value is not None}

    @property
    def metrics(self) -> dict[str, float]:
        """Return the figures as metrics of a run."""
        return {f"cost/{name}": value for name, value in self.figures.items()}

    @property
    def lines(self) -> dict[str, str]:
        """Write a line of GPU-seconds and, with a price, one of money, by what it begins with."""
        now, then = self.measured, self.planned
        lines = {"cost": f"{now.gpu_seconds:.0f} GPU-seconds, {then.gpu_seconds:.0f} planned"}
        if now.money is not None and then.money is not None:
            both = f"{in_money(now.money)}, {in_money(then.money)} planned"
            lines["money"] = f"{both}, at {now.price_per_gpu_hour:g} a card and hour"
        return lines


def in_money(amount: float) -> str:
    """Write an amount with two digits behind the point, or with two that count if it is small."""
    return f"{amount:.2f}" if amount >= 0.1 or amount == 0 else f"{amount:.2g}"
