"""Options that go together, by the names of NLSQ's presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PRESETS"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "aggressive": {
        "warmup_iterations": 50,
        "max_warmup_iterations": 100,
        "loss_plateau_threshold": 5e-4,
        "gradient_norm_threshold": 5e-3,
        "gauss_newton_tol": 1e-7,
        "chunk_size": 20_000,
    },
    "conservative": {
        "warmup_iterations": 30,
        "max_warmup_iterations": 80,
        "loss_plateau_threshold": 1e-5,
        "gradient_norm_threshold": 1e-4,
        "gauss_newton_tol": 1e-10,
        "gauss_newton_max_iterations": 200,
        "trust_region_initial": 0.5,
    },
    "memory_optimized": {
        "chunk_size": 5_000,
        "warmup_iterations": 40,
        "max_warmup_iterations": 100,
        "checkpoint_frequency": 50,
        "cg_param_threshold": 1_000,
        "precision": "mixed",
        "cache_bytes": 0,
    },
    "defense_strict": {
        "warm_start_threshold": 0.01,
        "cost_increase_tolerance": 0.05,
        "max_warmup_step_size": 0.05,
        "warmup_iterations": 25,
        "max_warmup_iterations": 60,
    },
    "defense_relaxed": {
        "warm_start_threshold": 0.5,
        "cost_increase_tolerance": 0.5,
        "max_warmup_step_size": 0.5,
        "warmup_iterations": 50,
        "max_warmup_iterations": 120,
    },
    "defense_disabled": {
        "enable_warm_start_detection": False,
        "enable_adaptive_warmup_lr": False,
        "enable_cost_guard": False,
        "enable_step_clipping": False,
    },
    "scientific_default": {
        "warm_start_threshold": 0.05,
        "cost_increase_tolerance": 0.2,
        "max_warmup_step_size": 0.1,
        "warmup_iterations": 35,
        "max_warmup_iterations": 100,
        "gauss_newton_tol": 1e-10,
        "gauss_newton_max_iterations": 200,
        "enable_checkpoints": True,
    },
}
