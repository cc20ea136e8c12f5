"""What is said about a key that does not exist: that it was renamed, or which keys are meant, by the words of other trainers too."""

from __future__ import annotations

import difflib

from swirl_fast.config.error import ConfigError
from swirl_fast.config.fields import sections, settings
from swirl_fast.config.yaml_text import Tree, shown

RENAMED = {
    "collect.max_steps": "tasks.max_steps",
    "training.samples_per_state": "training.group_size",
    "training.lag_after": "training.on_policy_batches",
}

# What other libraries call a setting, the last part of a key -> our keys, the likeliest first.
_SYNONYMS = {
    "accumulation gradient_accumulation gradient_accumulation_steps grad_accum": "training.token_budget training.trajectories_per_step",
    "adam_betas adam_beta1 adam_beta2 beta1 beta2": "training.betas",
    "adv_estimator advantage advantage_estimator algo loss rl_algorithm": "algorithm.name",
    "api_base base_url endpoint judge_url": "judge.model.url",
    "api_key": "judge.model.api_key_env engine.api_key_env",
    "async_level max_off_policy_steps max_offpolicy_steps off_policy staleness": "training.lag",
    "async_save": "training.async_checkpoints",
    "batch_size global_batch_size prompts_per_step train_batch_size": "training.trajectories_per_step training.token_budget collect.batch",
    "beta init_kl_coef kl kl_beta kl_coeff kl_coefficient kl_loss_coef kl_penalty": "algorithm.kl_coef",
    "chat_template_path template": "model.chat_template",
    "clip clip_eps clip_range clip_ratio cliprange eps epsilon": "algorithm.clip_low algorithm.clip_high",
    "clip_range_low clip_ratio_low epsilon_low": "algorithm.clip_low",
    "clip_range_high clip_ratio_high epsilon_high": "algorithm.clip_high",
    "clip_grad gradient_clipping grad_clip grad_norm max_grad_norm": "training.clip_grad_norm",
    "column column_map columns field_map input_key label_key prompt_key": "tasks.fields",
    "data data_path dataset_name dataset_path train_data train_file train_files": "tasks.path tasks.dataset",
    "embedding_model retriever_model": "search.model",
    "epochs max_train_steps num_epochs num_iterations num_steps num_train_epochs total_epochs total_steps": "training.steps",
    "eval_batch_size rollout_batch_size": "collect.batch",
    "eval_data eval_dataset test_file val_data val_file val_files": "tasks.eval_path",
    "exp_name experiment_name run_id run_name": "run.name",
    "few_shot fewshot num_fewshot num_shots shots": "tasks.examples",
    "fsdp hsdp sharding sharding_strategy": "training.shard_size",
    "gpu_memory_utilization mem_fraction_static": "engine.launch.memory_fraction",
    "grad_checkpointing gradient_checkpointing recompute": "training.activation_checkpointing",
    "group_size num_generations num_return_sequences num_rollouts num_samples_per_prompt rollouts_per_example samples_per_prompt": (
        "training.group_size collect.trajectories_per_question evaluate.samples"
    ),
    "importance_clip imp_ratio_cap tis tis_cap truncated_importance_sampling": "algorithm.importance_cap",
    "judge_model": "judge.model.model",
    "learning_rate lr step_size": "training.learning_rate",
    "limit max_samples num_prompts num_questions num_samples": "tasks.limit",
    "log_dir logging_dir out_dir output output_dir save_dir save_path": "run.folder",
    "logprobs top_logprobs": "judge.model.read",
    "loss_agg_mode loss_aggregation loss_type": "algorithm.weighting",
    "lr_schedule lr_scheduler lr_scheduler_type scheduler": "training.schedule",
    "max_completion_length max_gen_len max_new_tokens max_response_length max_tokens response_length": (
        "training.max_action_tokens collect.max_action_tokens evaluate.max_action_tokens judge.model.max_tokens"
    ),
    "max_length max_model_len max_prompt_length max_seq_len max_seq_length seq_len seq_length": "training.max_path_tokens",
    "max_concurrency max_parallel num_workers workers": "judge.model.concurrency",
    "max_num_seqs max_running_requests": "engine.max_sequences",
    "max_tokens_per_gpu micro_batch micro_batch_size mini_batch_size per_device_train_batch_size tokens_per_batch": "training.token_budget",
    "max_steps": "training.steps tasks.max_steps",
    "max_tool_calls max_turns num_turns turns": "tasks.max_steps",
    "metric_for_best_model": "training.keep_best",
    "min_lr lr_decay": "training.schedule",
    "model model_id model_name model_name_or_path model_path pretrained": "model.path judge.model.model",
    "mu num_mini_batches ppo_epochs updates": "algorithm.updates_per_batch",
    "name": "run.name model.path algorithm.name",
    "k num_passages": "search.top_k collect.top_k",
    "n": "training.group_size collect.trajectories_per_question evaluate.samples",
    "num_gpus n_gpus tensor_parallel_size tp tp_size": "engine.launch.gpus_per_server engine.launch.servers",
    "precision torch_dtype bf16 fp16": "model.dtype engine.dtype",
    "ref_model reference_model": "algorithm.kl_coef training.reference_offload",
    "compute_score custom_reward_function reward_fn reward_func reward_funcs reward_function": "judge.kind tasks.score",
    "corpus documents passages": "search.corpus",
    "criteria judge_prompt": "judge.model.rubric",
    "dynamic_sampling filter_groups": "training.refill filter.states",
    "reward reward_model": "algorithm.reward judge.kind",
    "system_prompt": "tasks.instructions",
    "rollout_engine backend": "engine.kind",
    "sampling_temperature temp": "training.temperature collect.temperature evaluate.temperature",
    "save_freq save_every save_interval save_steps checkpoint_interval": "training.checkpoint_every",
    "save_limit save_total_limit": "training.keep_checkpoints",
    "seed random_seed": "run.seed",
    "server servers server_url sglang_url": "engine.urls engine.launch.servers",
    "task task_name": "tasks.kind",
    "enable_tools": "evaluate.use_tools",
    "tool_config tool_config_path tools": "tasks.tools",
    "top_k": "collect.top_k search.top_k",
    "torch_compile": "training.compile",
    "use_liger use_liger_kernel": "training.liger",
    "use_wandb wandb_project report_to project": "training.wandb",
    "attn_implementation flash_attn use_flash_attention": "training.flash_attention",
    "warmup warmup_ratio num_warmup_steps": "training.warmup_steps",
    "wd decay": "training.weight_decay",
}
SYNONYMS = {word: keys.split() for words, keys in _SYNONYMS.items() for word in words.split()}


def closest(kind: type, key: str) -> list[str]:
    """At most three keys or sections of a config class that an unknown key may mean, the likeliest first.

    First a slip of the pen, then what other libraries call so and keys of this name elsewhere, those of the section that was written before
    others; only without any of these what looks alike.
    """
    known = [*settings(kind), *sections(kind)]
    key = key.lower().replace("-", "_")
    section, _, last = key.rpartition(".")

    def likeness(candidate: str) -> float:
        its_section, _, its_last = candidate.rpartition(".")
        return 0.7 * _likeness(last, its_last) + 0.3 * _likeness(section, its_section)

    alike = sorted(
        (name for name in known if _likeness(last, name.rpartition(".")[2]) >= 0.6), key=likeness, reverse=True
    )
    slips = [name for name in alike if likeness(name) > 0.9]
    meant = [name for name in SYNONYMS.get(last, ()) if name in known] + [
        name for name in known if name.rpartition(".")[2] == last
    ]
    meant.sort(key=lambda name: not (section and f"{name}.".startswith(f"{section}.")))
    return list(dict.fromkeys([*slips, *meant] or alike))[:3]


def _likeness(word: str, other: str) -> float:
    return difflib.SequenceMatcher(None, word, other).ratio()


def unknown_key(kind: type, key: str, node: Tree, source: str) -> ConfigError:
    """The error for a key that a layer sets and `kind` does not have. node: the value."""
    if RENAMED.get(key) in settings(kind):
        new = RENAMED[key]
        return ConfigError(f"{key} ({source}) was renamed to {new}: write {new}={shown(node)}")
    return ConfigError(f"{key} ({source}): unknown key{did_you_mean(kind, key)}")


def did_you_mean(kind: type, key: str) -> str:
    """The end of a message about an unknown key."""
    close = closest(kind, key)
    return f"; did you mean {' or '.join(close)}?" if close else "; swirl-fast config lists every key"
