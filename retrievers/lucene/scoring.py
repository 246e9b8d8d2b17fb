"""How a Lucene index scores its passages: BM25 or query likelihood, with or without query expansion."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from retrievers.base import RetrieverError

SCORINGS = ("bm25", "qld")


@dataclass(frozen=True, slots=True)
class Scoring:
    """How passages are scored; the defaults are Anserini's.

    Attributes:
        name: "bm25" (Robertson and Zaragoza 2009, doi:10.1561/1500000019), or "qld": the likelihood of the query with
            Dirichlet smoothing (Zhai and Lafferty 2004, doi:10.1145/984321.984322), both as Lucene computes them.
        k1: of BM25: how soon a term's repetition stops counting.
        b: of BM25: how much long passages are discounted, 0 to 1.
        mu: of query likelihood: how many words of the whole corpus are mixed into a passage.
        rm3: search again with the query expanded by words of the first hits (Abdul-Jaleel et al. 2004, TREC; relevance
            models of Lavrenko and Croft 2001). It takes several times as long.
        fb_terms: of RM3: words taken from the hits.
        fb_docs: of RM3: hits that words are taken from.
        original_query_weight: of RM3: share of the query itself, 0 to 1.
    """

    name: str = "bm25"
    k1: float = 0.9
    b: float = 0.4
    mu: float = 1000.0
    rm3: bool = False
    fb_terms: int = 10
    fb_docs: int = 10
    original_query_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in SCORINGS:
            raise RetrieverError(f"scoring is {self.name!r} and must be one of {', '.join(SCORINGS)}")
        if not self.k1 >= 0 or not 0 <= self.b <= 1:
            raise RetrieverError(f"k1 {self.k1} must not be negative and b {self.b} must lie between 0 and 1")
        if not self.mu > 0:
            raise RetrieverError(f"mu {self.mu} must be positive")
        if self.fb_terms < 1 or not 1 <= self.fb_docs <= 50 or not 0 <= self.original_query_weight <= 1:
            raise RetrieverError(
                f"fb_terms {self.fb_terms} must be at least 1, fb_docs {self.fb_docs} between 1 and 50 and "
                f"original_query_weight {self.original_query_weight} between 0 and 1"
            )

    def description(self) -> dict[str, object]:
        """What matters to this scoring."""
        used = {"bm25": ("k1", "b"), "qld": ("mu",)}[self.name]
        used += ("fb_terms", "fb_docs", "original_query_weight") if self.rm3 else ()
        values = asdict(self)
        return {"scoring": self.name, "rm3": self.rm3, **{name: values[name] for name in used}}
