"""Every setting of every stage: what there is (schema), what can work (check), and how a config is made (load)."""

from swirl_fast.config.check import ConfigError, check
from swirl_fast.config.load import dump, load
from swirl_fast.config.schema import (
    EMBEDDED_MODEL,
    AlgorithmConfig,
    CollectConfig,
    Config,
    EndpointConfig,
    EngineConfig,
    EvaluateConfig,
    FilterConfig,
    JudgeConfig,
    LaunchConfig,
    ModelConfig,
    RulesConfig,
    RunConfig,
    SearchConfig,
    TasksConfig,
    TrainingConfig,
    WeightSyncConfig,
)

__all__ = [
    "AlgorithmConfig",
    "CollectConfig",
    "Config",
    "ConfigError",
    "EMBEDDED_MODEL",
    "EndpointConfig",
    "EngineConfig",
    "EvaluateConfig",
    "FilterConfig",
    "JudgeConfig",
    "LaunchConfig",
    "ModelConfig",
    "RulesConfig",
    "RunConfig",
    "SearchConfig",
    "TasksConfig",
    "TrainingConfig",
    "WeightSyncConfig",
    "check",
    "dump",
    "load",
]
