"""Preference tuning after SFT: pairs in, an aligned adapter out (DPO, KTO)."""
