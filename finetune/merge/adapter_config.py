"""Read a peft adapter_config.json for merging, without peft, whose import takes longer than a small merge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class AdapterConfig:
    """peft's fields that define what an adapter trains, with peft's names and defaults (0.21.2)."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | list[str] = field(default_factory=list)
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> AdapterConfig:
        """Build from adapter_config.json; other fields are refused elsewhere or do not affect a merge."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in raw.items() if name in known and value is not None})

    def targets(self, module: str) -> bool:
        """Return whether peft gives `module` ("model.layers.0.self_attn.q_proj") low-rank factors."""
        if _named(self.exclude_modules or [], module) or self._saves(module):
            return False
        if isinstance(self.target_modules, str) or module in self.target_modules:
            return _named(self.target_modules, module)
        return _named(self.target_modules, module) and self._in_layers(module)

    def rank(self, module: str) -> int:
        """Return the rank of a module's factors."""
        return _first_match(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Return the scale of a module's product BA: alpha / r, or alpha / √r (arXiv:2312.03732)."""
        rank = self.rank(module)
        return float(
            _first_match(self.alpha_pattern, module, self.lora_alpha) / (rank**0.5 if self.use_rslora else rank)
        )

    def _saves(self, module: str) -> bool:
        return any(re.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in self.modules_to_save or [])

    def _in_layers(self, module: str) -> bool:
        """Return whether the module's layer is in `layers_to_transform`; always if that is empty."""
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        written = self.layers_pattern or []
        named = [written] if isinstance(written, str) else written
        before = [rf"(?:^|.*?\.){pattern}" for pattern in named] or [r".*?\.[^.]*"]
        matches = (re.match(rf"{start}\.(?P<layer>\d+)\.", module) for start in before)
        layer = next((int(match["layer"]) for match in matches if match), None)
        return layer in ([wanted] if isinstance(wanted, int) else wanted)


def _named(names: str | list[str], module: str) -> bool:
    """Return whether a regular expression matches the full name, or a list contains the name or its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _first_match(patterns: Mapping[str, T], module: str, default: T) -> T:
    """Return the value of the first matching pattern, as peft does, or `default`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
