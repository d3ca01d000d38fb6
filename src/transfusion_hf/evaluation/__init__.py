"""The comparisons of the paper's Table 1, for any Transfusion."""

from .perplexity import TextScore, perplexity

__all__ = ["TextScore", "perplexity"]
