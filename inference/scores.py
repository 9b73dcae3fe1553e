"""Owns how outputs compare with references: chrF, BLEU and exact matches, by sacrebleu, without holding any text.

Source: https://github.com/mjpost/sacrebleu; BLEU splits Chinese characters (tokenizer `zh`).
"""

from sacrebleu.metrics import BLEU, CHRF


class Scores:
    """Sums of sentence statistics."""

    def __init__(self) -> None:
        self._metrics = {"chrf": CHRF(), "bleu": BLEU(tokenize="zh")}
        self._sums: dict[str, list[int]] = {}
        self.count = self._exact = 0

    def add(self, output: str, reference: str) -> None:
        """Take in one output and what it should be."""
        self.count += 1
        self._exact += output == reference.strip()
        for name, metric in self._metrics.items():
            statistics = metric._extract_corpus_statistics([output], [[reference]])[0]
            self._sums[name] = [
                a + b for a, b in zip(self._sums.get(name, [0] * len(statistics)), statistics, strict=True)
            ]

    def summary(self) -> dict[str, float]:
        """Corpus chrF and BLEU (0 to 100) and the share of exact matches; needs at least one row."""
        scores = {
            name: round(metric._compute_score_from_stats(self._sums[name]).score, 2)
            for name, metric in self._metrics.items()
        }
        return {**scores, "exact_match": round(self._exact / self.count, 4), "count": self.count}
