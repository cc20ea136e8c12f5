from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from swirl_fast.config import Config, ConfigError, check, dump, load
from swirl_fast.config.contents import contents
from swirl_fast.outputs.run import find_run
from swirl_fast.tasks import load_task


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("svamp.json", "gsm8k.jsonl"):
        (tmp_path / "data" / name).write_text("[]")
    data = tmp_path / "data.json"
    data.write_text("[]")
    config = load(path, [f"tasks.path={data}"])
    if config.tasks.kind != "reasoning_gym":
        with pytest.raises(ConfigError, match="tasks.path=.*: no such file"):
            load(path)
    load(path, files=False)


@pytest.mark.parametrize("key", ["tasks.path", "tasks.eval_path"])
@pytest.mark.parametrize(
    "name",
    ["x.jsonl.gz", "x.csv", "X.JSONL", "x.ndjson", "x.jsonl.zst", "x.csv.bz2", "x.zip", "x.xlsx", "a/b/c", "~/x"],
)
def test_a_data_file_that_is_not_there_is_named_at_once(key: str, name: str) -> None:
    """And not looked for on the Hugging Face hub."""
    with pytest.raises(ConfigError, match=f"^{key}={name}: no such file$"):
        load(None, ["tasks.kind=gsm8k", *["tasks.path=org/name"] * (key != "tasks.path"), f"{key}={name}"])


@pytest.mark.parametrize("length", [256, 300, 5000])
def test_a_long_text_is_no_file(length: int, tmp_path: Path) -> None:
    """No file system has a name of more than 255 bytes, and no path of more than 4096."""
    text = "Answer in one word. " * (length // 20 + 1)
    file = tmp_path / "c.yaml"
    file.write_text(f"tasks.instructions: '{text}'\ntasks.mix: [{{instructions: '{text}'}}]")
    config = load(file)
    assert config.tasks.instructions == text == config.tasks.mix[0]["instructions"]
    assert load_task(load(None, [f"tasks.instructions={text}"]).tasks, 0).instructions == text
    assert contents(config.tasks, "tasks")["instructions"] == text
    file.write_text(dump(config))
    assert load(file) == config
    for setting in ("tasks.path", "search.corpus", "model.chat_template", "collect.path", "judge.model.rubric"):
        with pytest.raises(ConfigError, match=f"^{setting}=xxx"):
            load(None, [f"{setting}={'x' * length}.jsonl", "collect.source=conversations", "judge.kind=model"])
    with pytest.raises(ConfigError, match="no such file; ready ones go by their names"):
        load("x" * length)
    with pytest.raises(ConfigError, match="there is no file"):
        load(None, [f"judge.kind={'x' * length}.py:name"])
    with pytest.raises(ConfigError, match="there is no run"):
        find_run("x" * length, config)


def test_round_trip(tmp_path: Path) -> None:
    config = load(None, ["training.steps=3", "tasks.options={min_terms: 3}", "model.path=org/name"])
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert load(file) == config


@pytest.mark.parametrize(
    "key",
    ["model.path", "model.chat_template", "tasks.path", "tasks.instructions", "search.corpus", "judge.model.rubric"],
)
def test_a_saved_config_means_the_files_it_was_made_with(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not what a run has put beside it under the same name, such as the trained model; from another folder, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").write_text("what was named")
    config = load(None, [f"{key}=model"], files=False)
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    (run / "model").write_text("the run's own")
    (run / "config.yaml").write_text(dump(config))
    for folder in (tmp_path, run):
        monkeypatch.chdir(folder)
        assert attrgetter(key)(load(tmp_path / "runs/x/config.yaml", files=False)) == str(tmp_path / "model")


@pytest.mark.parametrize("key", ["training.shards", "filter.upload", "engine.launch.python"])
def test_the_home_folder_in_a_place(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line, where no shell expands it, and in a file; not in a URL, nor in the middle of a path."""
    monkeypatch.setenv("HOME", "/home/somebody")
    file = tmp_path / "c.yaml"
    file.write_text(f"{key}: ~/x/y")
    for config in (load(file), load(None, [f"{key}=~/x/y"])):
        assert attrgetter(key)(config) == "/home/somebody/x/y"
    for same in ("s3://bucket/~/x", "a/~/x", "x", ""):
        assert attrgetter(key)(load(None, [f"{key}={same}"])) == same


def test_a_saved_mixture_means_the_files_it_was_made_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path, tmp_path / "run"):
        place.mkdir(exist_ok=True)
        (place / "d.jsonl").write_text("{}")
    config = load(None, ["tasks.mix=[{kind: qa, path: d.jsonl, limit: 3}]"])
    (tmp_path / "run" / "config.yaml").write_text(dump(config))
    assert load("run/config.yaml").tasks.mix == [{"kind": "qa", "path": str(tmp_path / "d.jsonl"), "limit": 3}]


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("training: {steps: 3, learning_rate: 1e-5}\n")
    config = load(file, ["training.steps=4"])
    assert (config.training.steps, config.training.learning_rate) == (4, 1e-5)


def test_an_empty_table_drops_what_was_in_it(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("tasks: {dataset: gsm_symbolic, options: {difficulty: 2.0, lines: 3}, limit: 7}\n")

    def options(*overrides: str) -> dict[str, Any]:
        config = load(file, overrides)
        assert config.tasks.limit == 7, "only the table of free keys is emptied"
        return config.tasks.options

    assert options() == {"difficulty": 2.0, "lines": 3}
    assert options("tasks.options={lines: 4}") == {"difficulty": 2.0, "lines": 4}
    assert options("tasks.options={}") == options("tasks={options: {}}") == {}
    assert options("tasks.options={}", "tasks.options.a=1", "tasks.options.b=2") == {"a": 1, "b": 2}
    assert options("tasks.options.a=1", "tasks.options={}", "tasks.options.b=2", "training.steps=3") == {"b": 2}
    assert options("tasks={}", "training={}")["lines"] == 3, "a section is no such table"
    environment = load(None, ["engine.launch.environment={A: b}", "engine.launch.environment={}"]).engine.launch
    assert environment.environment == {}
    file.write_text("tasks: {options: {}, dataset: gsm_symbolic}\n")
    assert load(file).tasks.options == {}
    with pytest.raises(ConfigError, match=r"training.step \(command line\): unknown key"):
        load(file, ["tasks.options={}", "training.step=3"])
    with pytest.raises(ConfigError, match="tasks"):
        load(file, ["tasks=3"])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.step=3", ["training.step", "unknown key", "training.steps"]),
        ("nonsense.key=3", ["nonsense", "unknown key"]),
        ("training.steps=abc", ["training.steps=abc", "a whole number, at least 0"]),
        ("training.steps=1.5", ["training.steps", "1.5"]),
        ("training.steps", ["section.key=value"]),
        ("training=[1", ["not readable"]),
        ("model=3", ["model=3", "section", "model.path"]),
        ("training.steps=", ["training.steps=: must be a whole number"]),
        ("training.compile=maybe", ["training.compile=maybe", "true or false"]),
        ("training.lag=2", ["training.lag=2", "one of 0, 1"]),
        ("training.learning_rate=1e999", ["training.learning_rate=inf", "finite", "above 0"]),
        ("training.steps=" + "9" * 5000, ["training.steps=99999", "whole number"]),
        ("engine.urls=http://a:1", ["engine.urls=http://a:1", "a list of texts"]),
        ("engine.launch.gpus=[-1]", ["engine.launch.gpus=[-1]", "each at least 0"]),
        ("tasks.options=[1]", ["tasks.options=[1]", "a table"]),
        ("tasks.options={a: 1, a: 2}", ["tasks.options", "'a' is there twice"]),
        ("tasks.options={[1]: 2}", ["tasks.options", "a key must be a word"]),
        ("tasks.options=!!python/name:os.system x", ["tasks.options", "could not determine a constructor"]),
        ("tasks.options=" + "[" * 1100, ["tasks.options", "nested too deeply"]),
        ("tasks.options=&a [*a]", ["tasks.options", "nested too deeply"]),
        ("run.name=a\0b", ["run.name=", "NUL"]),
        ("run.name=\udc80", ["run.name=\\udc80", "surrogate"]),
        ("tasks.options.a=\0", ["tasks.options"]),
        ("training.group_size=1", ["training.group_size=1", "at least 2", "reinforce"]),
        ("training.learning_rate=nan", ["learning_rate=nan"]),
        ("training.learning_rate=-1", ["learning_rate", "above 0"]),
        ("training.max_path_tokens=-1", ["training.max_path_tokens=-1", "at least 0"]),
        ("training.betas=[0.9]", ["training.betas=[0.9]", "a list of 2 numbers, each in [0, 1)"]),
        ("training.shards=ftp://host/x", ["training.shards=ftp://host/x", "s3://", "hf://"]),
        ("filter.upload=hf://datasets/a/b", ["filter.upload=hf://datasets/a/b", "s3://"]),
        ("training.shards_cache_limit=10", ["training.shards_cache_limit=10", "10gb"]),
        ("training.bad_shards=ignore", ["training.bad_shards=ignore", "stop, skip"]),
        ("training.prefetch=-1", ["training.prefetch=-1", "at least 0"]),
        ("training.shuffle_shards=-1", ["training.shuffle_shards=-1", "at least 0"]),
        ("training.keep_best=loss", ["training.keep_best=loss", "process_label, reward, malformed"]),
        ("training.time_limit=-5", ["training.time_limit=-5", "at least 0"]),
        ("training.max_skipped_steps=0", ["training.max_skipped_steps=0", "at least 1"]),
        ("training.kl_warning=nan", ["training.kl_warning=nan", "at least 0"]),
        ("training.schedule=linear", ["training.schedule=linear", "constant, cosine"]),
        ("training.activation_checkpointing=true", ["activation_checkpointing=", "none, full, selective"]),
        ("training.shard_size=-1", ["training.shard_size=-1", "at least 0"]),
        ("training={liger: true, compile: true}", ["training.liger=True", "training.compile"]),
        ("algorithm.name=dpo", ["algorithm.name=dpo", "rloo"]),
        ("algorithm.clip_low=1.0", ["algorithm.clip_low"]),
        ("algorithm.updates_per_batch=2", ["updates_per_batch=2", "ppo"]),
        ("filter.kind=best", ["filter.kind=best", "process_and_outcome"]),
        ("collect.temperature=0", ["collect.temperature=0", "alike"]),
        ("collect.top_p=0", ["collect.top_p"]),
        ("evaluate.samples=3", ["evaluate.samples=3", "evaluate.temperature"]),
        ("judge.kind=model", ["judge.model.url", "http"]),
        ("tasks.kind=gsm8k", ["tasks.path", "gsm8k"]),
        ("tasks.path=/no/such/file.jsonl", ["tasks.path=/no/such/file.jsonl", "no such file"]),
        ("run.name=a/b", ["run.name=a/b"]),
        ("engine.kind=vllm", ["engine.kind=vllm", "local, sglang"]),
        ("engine.retries=-1", ["engine.retries=-1", "at least 0"]),
        ("engine.max_restarts=-1", ["engine.max_restarts=-1", "at least 0"]),
        ("engine.timeout=0", ["engine.timeout=0", "above 0"]),
        ("engine.timeout=nan", ["engine.timeout=nan", "above 0"]),
        ("engine.urls=[10.0.0.2:30000]", ["engine.urls", "'10.0.0.2:30000'", "http://10.0.0.2:30000"]),
        ("engine.urls=['http://a:1/v1']", ["engine.urls", "'http://a:1/v1'", "not the address of a server"]),
        ("engine.urls=['http://h:port']", ["engine.urls=http://h:port", "not the address of a server", "Invalid port"]),
        ("engine.urls=['http://h:99999']", ["engine.urls=http://h:99999", "there is no port 99999"]),
        ("engine.urls=['http://[::1']", ["engine.urls=http://[::1", "not the address of a server"]),
        ("judge.model.url=http://h:port/v1", ["judge.model.url=http://h:port/v1", "Invalid port: 'port'"]),
        ("judge.model.url=http:///v1", ["judge.model.url=http:///v1", "it has no host"]),
        ("judge.model.replicas=['http://1.2.3.999/v1']", ["judge.model.replicas=http://1.2.3.999/v1"]),
        (
            f"run.seed={9 * 10**400}",
            ["run.seed=9", "is too large; must be a whole number, at least 0, and below 2**63"],
        ),
        (f"tasks.limit={2**63}", [f"tasks.limit={2**63}: is too large"]),
        (f"training.steps=-{2**63}", ["training.steps=-9", "is too large"]),
        (f"engine.launch.gpus=[{2**70}]", ["engine.launch.gpus=", "is too large"]),
        (f"training.learning_rate=0x{'f' * 400}", ["training.learning_rate=0xfff", "is too large"]),
        ("engine.urls=['http://a:1','http://a:1/']", ["engine.urls", "twice"]),
        ("engine.launch.servers=0", ["engine.launch.servers=0", "at least 1"]),
        ("engine.launch.gpus_per_server=0", ["engine.launch.gpus_per_server=0", "at least 1"]),
        ("engine.launch={servers: 2, gpus: [0, 0]}", ["engine.launch.gpus=[0, 0]", "2 different ones"]),
        ("engine.launch={gpus_per_server: 2, gpus: [1]}", ["engine.launch.gpus=[1]", "2 different ones"]),
        ("engine.launch.memory_fraction=1", ["engine.launch.memory_fraction=1", "(0, 1)"]),
        ("engine.launch.port=70000", ["engine.launch.port=70000", "65535"]),
        ("engine.launch.startup_timeout=0", ["engine.launch.startup_timeout=0", "above 0"]),
        ("engine.weight_sync.method=rdma", ["engine.weight_sync.method=rdma", "disk, tensor, distributed"]),
        ("engine.weight_sync.bucket_mb=0", ["engine.weight_sync.bucket_mb=0", "above 0"]),
        ("engine.weight_sync.timeout=-1", ["engine.weight_sync.timeout=-1", "above 0"]),
        (
            "engine={urls: ['http://10.0.0.2:1'], weight_sync: {method: tensor}}",
            ["engine.weight_sync.method=tensor", "http://10.0.0.2:1 is another", "disk or distributed"],
        ),
        ("training.max_engine_gap=-1", ["training.max_engine_gap=-1", "at least 0"]),
        ("training.max_engine_gap=nan", ["training.max_engine_gap=nan"]),
        ("algorithm.importance_cap=-0.5", ["algorithm.importance_cap=-0.5", "at least 0"]),
        ("training.on_policy_batches=-1", ["training.on_policy_batches=-1", "at least 0"]),
        ("algorithm.importance_level=action", ["algorithm.importance_level=action", "algorithm.importance_cap"]),
        ("algorithm.importance_level=sequence", ["algorithm.importance_level", "sequence", "token", "action"]),
        ("algorithm={name: sft, importance_cap: 2}", ["algorithm.importance_cap=2.0", "algorithm.name=sft", "use 0"]),
    ],
)
def test_bad_values_name_key_value_and_remedy(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(None, [override])
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("metric", "algorithm", "why"),
    [
        ("process_label", "algorithm.reward=outcome", "asks no process judge"),
        ("process_label", "algorithm.name=sft", "draws no actions"),
        ("reward", "algorithm.name=sft", "draws no actions"),
        ("malformed", "algorithm.name=sft", "draws no actions"),
    ],
)
def test_a_best_checkpoint_needs_a_metric_that_is_measured(metric: str, algorithm: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"training.keep_best={metric}: {algorithm} {why}"):
        load(None, [f"training.keep_best={metric}", algorithm])


@pytest.mark.parametrize("metric", ["reward", "malformed"])
def test_fresh_trajectories_have_a_best_checkpoint(metric: str) -> None:
    load(None, [f"training.keep_best={metric}", "algorithm.reward=outcome"])


def test_sampling_beside_the_training_needs_an_engine_of_its_own() -> None:
    lagging = ["training.lag=1", "algorithm.importance_cap=2"]
    for engine in ("engine.own_process=true", "engine.kind=sglang"):
        load(None, [*lagging, engine])
    with pytest.raises(ConfigError, match="training.lag=1: engine.kind=local generates.*engine.own_process=true"):
        load(None, lagging)


def test_a_number_that_no_float_can_hold_is_compared_all_the_same() -> None:
    """Of a config that was made in Python."""
    config = Config()
    config.run.seed = -(10**400)
    with pytest.raises(ConfigError, match="run.seed=-1.*must be at least 0"):
        check(config)


def test_a_folder_in_the_home_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load(None, ["run.folder=~/runs", "run.name=x"])
    assert config.folder == Path("/home/somebody/runs/x") and config.store == config.folder / "trajectories.db"


def test_an_offloaded_reference_needs_a_reference() -> None:
    load(None, ["training.reference_offload=true"])
    with pytest.raises(ConfigError, match="training.reference_offload=True: algorithm.kl_coef=0"):
        load(None, ["training.reference_offload=true", "algorithm.kl_coef=0"])


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.yaml")
    file = tmp_path / "c.yaml"
    file.write_text("training: {steps: [")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load(file)
    file.write_text("- a\n- b\n")
    with pytest.raises(ConfigError):
        load(file)


@pytest.mark.parametrize(
    "override",
    [
        "engine={kind: sglang, urls: ['http://127.0.0.1:1', 'http://localhost:2/'], weight_sync: {method: tensor}}",
        "engine={kind: sglang, urls: ['https://gpu-1.example:30000'], weight_sync: {method: distributed}}",
        "engine={kind: sglang, launch: {servers: 2, gpus_per_server: 2, gpus: [4, 5, 6, 7]}}",
        "engine={kind: sglang, launch: {flags: [--kv-cache-dtype, fp8_e5m2], environment: {A: b}}}",
    ],
)
def test_servers_that_can_be(override: str) -> None:
    load(None, [override])


@pytest.mark.parametrize("setting", ["tasks.path=a.json", "model.chat_template=a.jinja", "search.model=./a"])
def test_files_may_be_left_unchecked(setting: str) -> None:
    load(None, [setting], files=False)
    with pytest.raises(ConfigError, match=f"{setting}: no such"):
        load(None, [setting])


def test_defaults_are_possible() -> None:
    check(Config())
