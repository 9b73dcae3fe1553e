"""Owns how outputs compare with references: chrF, BLEU and exact matches, without holding any text.

BLEU counts word sequences that output and reference share, chrF character sequences. Both are computed by
sacrebleu, from sums of statistics of single sentences, so that no text is kept. BLEU splits Chinese
characters (tokenizer `zh`).

Refuses to know where texts come from.

Source: https://github.com/mjpost/sacrebleu
"""

from collections.abc import Collection

from sacrebleu.metrics import BLEU, CHRF


class Scores:
    """Sums of the statistics of sentences, for some of the scores or for all."""

    def __init__(self, names: Collection[str] = ("chrf", "bleu")) -> None:
        metrics = {"chrf": CHRF(), "bleu": BLEU(tokenize="zh")}
        self._metrics = {name: metric for name, metric in metrics.items() if name in names}
        self._sums: dict[str, list[int]] = {}
        self.count = 0
        self._num_exact = 0

    def add(self, output: str, reference: str) -> None:
        """Count one output and its reference."""
        self.count += 1
        self._num_exact += output == reference.strip()
        for name, metric in self._metrics.items():
            statistics = metric._extract_corpus_statistics([output], [[reference]])[0]
            sums = self._sums.get(name, [0] * len(statistics))
            self._sums[name] = [total + one for total, one in zip(sums, statistics, strict=True)]

    def summary(self) -> dict[str, float]:
        """Return corpus chrF and BLEU (0 to 100) if asked for, the share of exact matches and the count.

        Needs at least one output.
        """
        scores: dict[str, float] = {}
        for name, metric in self._metrics.items():
            scores[name] = round(metric._compute_score_from_stats(self._sums[name]).score, 2)
        return {**scores, "exact_match": round(self._num_exact / self.count, 4), "count": self.count}
