"""Preference training (DPO, KTO) of an adapter on rendered pairs, and what it changed."""
