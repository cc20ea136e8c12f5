"""Every setting of every stage: what there is (schema), what works together (check), how a config is made (load, read), and how all that
is shown (describe, hints).

YAML is read as text, and each value by the type of its setting (read, yaml_text): no library of configs leaves `3.10`, `${x}` and `???`
only in a text.
"""

from swirl_fast.config.check import check, refuse_secrets, task_configs
from swirl_fast.config.engine_schema import EngineConfig, LaunchConfig, WeightSyncConfig
from swirl_fast.config.error import ConfigError
from swirl_fast.config.judge_schema import EndpointConfig, JudgeConfig, RecordedActionConfig, RulesConfig
from swirl_fast.config.load import dump, load
from swirl_fast.config.schema import (
    EMBEDDED_MODEL,
    ActionsConfig,
    AlgorithmConfig,
    CollectConfig,
    Config,
    EvaluateConfig,
    FilterConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    SearchConfig,
    TasksConfig,
    ToolsConfig,
    TrainingConfig,
)

__all__ = [
    "ActionsConfig",
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
    "LoraConfig",
    "ModelConfig",
    "RecordedActionConfig",
    "RulesConfig",
    "RunConfig",
    "SearchConfig",
    "TasksConfig",
    "ToolsConfig",
    "TrainingConfig",
    "WeightSyncConfig",
    "check",
    "dump",
    "load",
    "refuse_secrets",
    "task_configs",
]
