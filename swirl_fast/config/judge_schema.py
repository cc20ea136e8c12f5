"""The settings of the judges, as in schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from swirl_fast.config.fields import setting

Coverage = Literal["connected", "full", "single"]
COVERAGES: tuple[str, ...] = get_args(Coverage)
JUDGES = ("rules", "model", "reference", "recorded_action")


@dataclass
class RulesConfig:
    """The judge that goes by rules (judge.kind=rules)."""

    coverage: Coverage = "connected"
    """connected: steps may compute parts, and the answer must rest on all numbers of the question. full: one calculation for all. single:
    one calculation, for word problems that hold numbers which are not needed."""
    coverage_by_task: dict[str, Coverage] = field(default_factory=dict)
    """Another coverage for some of the tasks, by their names, such as {svamp: single}."""
    constants: list[float] = setting([1.0, 2.0, 100.0])
    """Numbers that a calculation may use without their being in the context."""


@dataclass
class EndpointConfig:
    """A language model as a judge: of steps with judge.kind=model, of answers with filter.outcome=judge or evaluate.outcome=judge."""

    url: str = ""
    """An OpenAI-compatible endpoint, such as http://127.0.0.1:30000/v1."""
    replicas: list[str] = field(default_factory=list)
    """More endpoints that serve the same model; one that is dead is left out, and tried again later."""
    rubric: str = setting("", reads="file")
    """A text file of criteria in plain words, in place of the built-in ones."""
    scale: int = setting(0, minimum=0)
    """Steps are graded from 1 to this number, which become rewards in [0, 1]; 0: GOOD or BAD."""
    explain: bool = True
    """The judge explains itself before its verdict. false: it gives the verdict alone, in a few tokens."""
    read: Literal["text", "logprobs"] = "text"
    """text: the reply's last line. logprobs: a graded reward, the probability of GOOD against BAD in its place (with a scale, the mean of
    the scores by their probabilities); of endpoints that give log-probs, as SGLang, vLLM and llama.cpp do."""
    margin: float = setting(0.02, minimum=0, below=0.5)
    """logprobs: a probability nearer to 1/2 than this is no verdict (UNKNOWN)."""
    model: str = "default"
    """The name of the model, as the endpoint knows it."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; where it is not set, none is sent."""
    temperature: float = setting(0.0, minimum=0)
    """Of the judge's replies; 0: always the likeliest token."""
    max_tokens: int = setting(512, minimum=1)
    """Tokens of one reply at most; a reply that is cut off gives no verdict."""
    timeout: float = setting(60.0, above=0)
    """Seconds for one try."""
    retries: int = setting(4, minimum=0)
    """Further tries after a failure, with exponential back-off."""
    concurrency: int = setting(16, minimum=1)
    """Requests under way at a time."""


@dataclass
class RecordedActionConfig:
    """The reward that compares an action with the one recorded at its state (judge.kind=recorded_action, docs/pivotrl.md)."""

    arguments: Literal["fuzzy", "exact"] = "fuzzy"
    """fuzzy: texts agree by degrees, by their words, and a call by the mean of its arguments. exact: a call or an answer agrees or not."""
    threshold: float = setting(0.0, minimum=0, maximum=1)
    """An agreement below it is worth 0, others what they are; 0: all are. 1: only full agreement counts, as a reward of 0 or 1."""
    turns_without_a_call: str = setting("unknown", reads="reference", known=("unknown",))
    """Where the recorded turn is neither a call nor an answer. unknown: no reward (UNKNOWN). Your own: a function as of judge.kind, whose
    steps have `recorded`, the text of that turn; it also sees fresh turns without a call, of `action.kind` malformed."""


@dataclass
class JudgeConfig:
    """Stage 2: a verdict on every step, GOOD, BAD or UNKNOWN, and its reward."""

    kind: str = setting("rules", reads="reference", known=JUDGES)
    """rules: judge.rules. model: judge.model. reference: is shown the worked solutions, for studies (judges/reference.py).
    recorded_action: compares with what was done in the recorded trajectory (PivotRL). Your own: a function of a step that gives a reward in
    [0, 1], true, false, or none where it cannot say; or a class."""
    self_consistency: bool = False
    """An answer is also held against those of the other trajectories of its question: GOOD where more give it than any other one, BAD where
    at least twice as many give another one, else as judge.kind says. Without gold labels, and without a judge that could answer
    (docs/judges.md)."""
    rules: RulesConfig = field(default_factory=RulesConfig)
    model: EndpointConfig = field(default_factory=EndpointConfig)
    recorded_action: RecordedActionConfig = field(default_factory=RecordedActionConfig)
