"""One unit vector per text: TF-IDF with latent semantics (`lsa`, no model needed), or a model's (`encoders.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.dedup.embedding_names import LSA, STATIC
from finetune.engine.local import Local

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from finetune.context import Context
    from finetune.engine.interface import Engine

WORD_OR_SIGN = r"\w+|[^\w\s]"  # punctuation counts: `a < b` and `a <= b` are two different answers
HASHED_FEATURES = 2**20
SVD_FEATURES = 30_000  # the most frequent ones; the rare ones, which distinguish texts, are all in the sketch
SVD_DIMENSION = 128
SKETCH_DIMENSION = 256
RESIDUAL_WEIGHT = 0.5
FITTED_ROWS = 100_000  # more texts are transformed in parts, by what a sample of this size gave
PART_ROWS = 8192
SEED = 0  # of the algorithm, not of the recipe: another seed gives another approximation of the same cosines


def embed(
    texts: Sequence[str],
    name: str,
    ctx: Context,
    folder: Path | None = None,
    made_by: Mapping[str, object] | None = None,
) -> NDArray[np.float32]:
    """Return vectors of `texts`: (N, d) float32, every row of length 1, or all zero for a text of whitespace only.

    Args and Raises as `embed_counted`.
    """
    return embed_counted(texts, name, ctx, folder, made_by)[0]


def embed_counted(
    texts: Sequence[str],
    name: str,
    ctx: Context,
    folder: Path | None = None,
    made_by: Mapping[str, object] | None = None,
) -> tuple[NDArray[np.float32], int]:
    """Return the vectors as `embed` does, and the number of texts embedded: without copies and cached ones.

    Args:
        texts: texts to embed; equal texts get equal vectors.
        name: `lsa`, `model2vec:` and a static model on the Hub, or a sentence-transformers model on the Hub.
        ctx: Hub cache, device, progress and stop flag.
        folder: the folder of a local model; `name` then only labels it.
        made_by: digests or revision of the model, the cache key of a sentence-transformers model's vectors; None
            disables the cache.

    Raises:
        InputError: the model is neither local nor downloadable.
    """
    if not texts:
        return np.zeros((0, 1), np.float32), 0
    vectors, made = np.zeros((len(texts), 1), np.float32), 0
    unique = {text: None for text in texts if text.strip()}
    if unique:
        # Each text once: copies then are copies bit by bit, whatever batch they would have been in.
        rows = {text: row for row, text in enumerate(unique)}
        cached, made = _cached_vectors(list(unique), name, ctx, folder, made_by)
        vectors = np.zeros((len(texts), cached.shape[1]), np.float32)
        filled = [i for i, text in enumerate(texts) if text in rows]
        vectors[filled] = _unit(cached)[[rows[texts[i]] for i in filled]]
    return vectors, made


def _cached_vectors(
    texts: list[str], name: str, ctx: Context, folder: Path | None, made_by: Mapping[str, object] | None
) -> tuple[NDArray[np.float32], int]:
    from finetune.dedup import encoders

    if name == LSA and folder is None:
        return lsa(texts, ctx.engine), len(texts)
    if name.startswith(STATIC):
        return encoders.static(texts, name.removeprefix(STATIC), ctx, folder), len(texts)
    return encoders.sentences(texts, name, ctx, folder, made_by)


def lsa(texts: Sequence[str], engine: Engine = Local()) -> NDArray[np.float32]:  # noqa: B008 - frozen
    """Return TF-IDF of words and word pairs in 384 dimensions: 128 of latent semantics, 256 sketching the residual.

    A truncated SVD alone (Deerwester et al. 1990; randomised, Halko et al. 2011) keeps a quarter of the energy, and
    after scaling to length 1, texts that differ only in the residual become equal: of its pairs at 0.95 fewer than half
    are near-duplicates. So the residual x - VVᵀx is added as a count sketch (Charikar et al. 2002), which preserves
    inner products in expectation, at half its length: wording has to agree too, but a changed word has less weight than
    in TF-IDF itself.

    Of more than FITTED_ROWS texts, evenly spread ones decide frequencies and directions; all are transformed in parts.

    Args:
        texts: N texts, each with at least one character that is not whitespace.
        engine: runs the parts.

    Returns:
        (N, 384) float32, not scaled; fewer dimensions if there are fewer words.
    """
    if len(texts) > FITTED_ROWS:
        some = [texts[k * len(texts) // FITTED_ROWS] for k in range(FITTED_ROWS)]
        fitted = _Fitted.to(_counts_of(some, engine))
        return np.concatenate(list(engine.map(partial(_same, fitted.transform), _parts(texts), len(texts))))
    weights = _tf_idf(texts, engine)
    rows, features = weights.shape
    if features <= SVD_DIMENSION + SKETCH_DIMENSION:
        return np.asarray(weights.toarray(), np.float32)
    frequency = np.bincount(weights.indices, minlength=features)
    common = np.sort(np.argsort(-frequency, kind="stable")[:SVD_FEATURES])
    sketch = _sketch(features)
    basis = _directions(weights[:, common], min(SVD_DIMENSION, rows, len(common)))
    return _projected(weights, common, basis, sketch)


@dataclass(frozen=True)
class _Fitted:
    """LSA with the frequencies and directions of a sample; words outside the sample have the weight of rare ones.

    Attributes:
        idf: (HASHED_FEATURES,) float32, inverse document frequency of every hashed feature.
        common: the features of the truncated SVD, ascending.
        basis: (128, len(common)) float32.
    """

    idf: NDArray[np.float32]
    common: NDArray[np.int64]
    basis: NDArray[np.float32]

    @classmethod
    def to(cls, counts: Sequence[csr_matrix]) -> _Fitted:
        """Fit to the counts of parts of the texts."""
        from scipy.sparse import vstack

        rows = sum(part.shape[0] for part in counts)
        frequency = sum(np.bincount(part.indices, minlength=HASHED_FEATURES) for part in counts)
        idf = (np.log((1 + rows) / (1 + np.asarray(frequency))) + 1).astype(np.float32)  # scikit-learn's
        common = np.sort(np.argsort(-np.asarray(frequency), kind="stable")[:SVD_FEATURES])
        weights = vstack([_weighted(part, idf)[:, common] for part in counts]).tocsr()
        return cls(idf, common, _directions(weights, SVD_DIMENSION))

    def transform(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return (N, 384) float32 for `texts`; the result for a text does not depend on the others."""
        return _projected(_weighted(_counts(texts), self.idf), self.common, self.basis, _sketch(HASHED_FEATURES))


def _parts(texts: Sequence[str]) -> list[Sequence[str]]:
    return [texts[start : start + PART_ROWS] for start in range(0, len(texts), PART_ROWS)]


def _same(function: Callable[[Sequence[str]], Any]) -> Callable[[Sequence[str]], Any]:
    """Build a worker whose state is in the function itself."""
    return function


def _sketch(features: int) -> csr_matrix:
    from scipy.sparse import csr_matrix

    generator = np.random.default_rng(SEED)
    bucket = generator.integers(0, SKETCH_DIMENSION, features)
    sign = generator.choice(np.array([-1, 1], np.float32), features)
    return csr_matrix((sign, (np.arange(features), bucket)), shape=(features, SKETCH_DIMENSION))


def _directions(weights: csr_matrix, dimension: int) -> NDArray[np.float32]:
    """Return the first right singular vectors (dimension, F) of `weights` (N, F)."""
    from sklearn.utils.extmath import randomized_svd
    from threadpoolctl import threadpool_limits

    # The last directions are nearly degenerate: with another number of threads they rotate, and entries change by 2e-4.
    # On some processors (an AMD EPYC) the last bits of a product depend on the number of threads too.
    with threadpool_limits(1):
        _, _, basis = randomized_svd(weights, dimension, n_iter=2, random_state=SEED)
    return np.asarray(basis)


def _projected(
    weights: csr_matrix, common: NDArray[np.int64], basis: NDArray[np.float32], sketch: csr_matrix
) -> NDArray[np.float32]:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        latent = np.asarray(weights[:, common] @ basis.T, np.float32)
        residual = (weights @ sketch).toarray() - latent @ np.asarray(sketch[common].T @ basis.T, np.float32).T
    return np.hstack([latent, np.float32(RESIDUAL_WEIGHT) * residual]).astype(np.float32, copy=False)


def _tf_idf(texts: Sequence[str], engine: Engine) -> csr_matrix:
    """Return (N, F) float32, rows of length 1: sublinear term frequency × inverse document frequency.

    Hashed, because a vocabulary of all word pairs is larger than the texts, and one limited to frequent features lacks
    exactly the words by which two texts differ.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfTransformer

    counts = vstack(_counts_of(texts, engine), format="csr")
    used = np.unique(counts.indices)
    return TfidfTransformer(sublinear_tf=True).fit_transform(counts[:, used]).tocsr()


def _counts_of(texts: Sequence[str], engine: Engine) -> list[csr_matrix]:
    """Return the counts of each part of `texts`; counting takes 95 % of the time of LSA."""
    return list(engine.map(partial(_same, _counts), _parts(texts), len(texts)))


def _counts(texts: Sequence[str]) -> csr_matrix:
    """Return (N, HASHED_FEATURES) float32, how often each word or word pair occurs."""
    from sklearn.feature_extraction.text import HashingVectorizer

    counter = HashingVectorizer(
        token_pattern=WORD_OR_SIGN,
        ngram_range=(1, 2),
        n_features=HASHED_FEATURES,
        alternate_sign=False,
        norm=None,
        dtype=np.float32,
    )
    return counter.transform(texts)


def _weighted(counts: csr_matrix, idf: NDArray[np.float32]) -> csr_matrix:
    """Return the weights of `_tf_idf`, rows of length 1, given the inverse document frequencies."""
    from sklearn.preprocessing import normalize

    weights = counts.copy()
    weights.data = (1 + np.log(weights.data)) * idf[weights.indices]
    return normalize(weights, copy=False)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale rows to length 1; a row of zeros is unchanged."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
