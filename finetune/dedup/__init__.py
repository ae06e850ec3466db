"""Exact, Jaccard and cosine duplicates, and the embeddings and clusters they need."""
