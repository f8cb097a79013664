"""Every setting of every stage acts: with another value, alone, a tiny run comes out otherwise.

And where a setting must not act, as the runtime's, the same numbers come out to rounding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixpo import Pretrained
from mixpo.data.errors import InputError
from mixpo.experiments.cluster import InfraSettings, JobSettings
from mixpo.experiments.recipe import _get_section_types
from mixpo.models.digests import compute_model_digest
from mixpo.models.samplers import LocalSampler
from mixpo.settings import Settings
from mixpo.stages.ppo_settings import PPOSettings, count_updates_before_iterations
from mixpo.stages.rows import read_pairs, read_table
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import read_stage_summary
from mixpo.training.job import StageJob, locate_model_folder
from mixpo.training.record import read_jsonl, read_metrics
from mixpo.training.step import Diverged, OptimizerSettings, compute_learning_rate, select_batch_rows
from mixpo.training.supervised import SupervisedSettings, count_optimizer_steps
from models import Row, plain_logprobs, rows_of_sample, sample_of_rows
from worlds import TINY_LIMIT, TINY_RUNTIME, TinyWorld


@dataclass(frozen=True)
class OtherValue:
    """Another value of a setting than the stage has by default, and what must stand beside it so that it acts."""

    value: Any
    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CoveringTest:
    """A setting that another test shows to act: its file and its name."""

    file: str
    name: str


SEEDED = {"seed": OtherValue(1), "precision": OtherValue("bfloat16")}
OPTIMIZER = {
    "optimizer": CoveringTest("test_optimizers.py", "test_moments_in_8_bits_train_and_resume"),
    "learning_rate": OtherValue(0.02),
    "warmup_steps": OtherValue(2, {"epochs": 3}),
    "decay": OtherValue("linear", {"epochs": 3}),
    "weight_decay": OtherValue(0.7),
    "adam_betas": OtherValue((0.5, 0.6)),
    "max_grad_norm": OtherValue(1e-3),
}
SAMPLER = {
    "sampler": CoveringTest("test_vllm_sampler.py", "test_ppo_learns_from_the_servers_completions"),
}
LORA = {"lora": OtherValue({"rank": 2})}
SUPERVISED = {
    **SEEDED,
    **OPTIMIZER,
    **LORA,
    "epochs": OtherValue(2),
    "batch_size": OtherValue(3),
    "max_completion_tokens": OtherValue(4),
}
RUNTIMES = {
    "device": "auto",
    "threads": 2,
    "microbatch_tokens": 60,
    "sampling_gib": 1e-4,
    "cuda_graphs": True,
    "activation_checkpointing": True,
    "offload_optimizer": True,
    "checkpoint_minutes": 0,
}

TABLE: dict[str, dict[str, OtherValue | CoveringTest]] = {
    "model": {
        "path": OtherValue("{folder}/base"),
        "revision": CoveringTest("test_settings.py", "test_a_revision_is_the_commit_that_is_asked_for"),
        "chat_template": OtherValue("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"),
        "template_arguments": CoveringTest("data/test_tokens.py", "test_template_arguments_are_saved_with_the_model"),
        "dtype": CoveringTest("test_loading.py", "test_a_recipe_may_choose_the_type"),
        "init_seed": OtherValue(1),
    },
    "data": {
        "format": OtherValue("hh-rlhf"),
        "train": OtherValue("{folder}/more.jsonl"),
        "test": OtherValue("{folder}/test.jsonl"),
        "demonstrations": OtherValue("{folder}/shown.jsonl"),
        "second": OtherValue("{folder}/more.jsonl", {"second_rows": 4}),
        "revision": CoveringTest("data/test_sources.py", "test_hub_preferences"),
        "train_rows": OtherValue(5),
        "test_rows": OtherValue(1),
        "demonstration_rows": OtherValue(5),
        "test_share": OtherValue(0.4),
        "second_rows": OtherValue(4),
        "special_tokens": CoveringTest("data/test_tokens.py", "test_special_tokens_setting_reaches_every_stage"),
        "shared_prompts": CoveringTest(
            "test_stages.py", "test_prompts_of_train_and_test_are_counted_and_left_out_on_request"
        ),
        "max_prompt_tokens": OtherValue(12, {"on_bad_row": "drop"}),
        "on_bad_row": OtherValue("drop", {"train": "{folder}/bad.jsonl", "test": "{folder}/test.jsonl"}),
        "data_seed": OtherValue(1),
    },
    "label_noise": {"share": OtherValue(0.5), "seed": OtherValue(1, {"share": 0.5})},
    "sft": SUPERVISED,
    "reward": {
        **SUPERVISED,
        "validation_share": OtherValue(0.3),
        "center_coef": OtherValue(0.5),
        "head": OtherValue("fitted"),
        "head_ridge": OtherValue(50.0, {"head": "fitted"}),
    },
    "samples": {
        **SEEDED,
        **SAMPLER,
        "temperature": OtherValue(0.3),
        "top_p": OtherValue(0.3),
        "top_k": OtherValue(2),
        "max_completion_tokens": OtherValue(4),
        "prompts": OtherValue(5),
    },
    "selection": {
        "threshold": OtherValue(0.45, {"threshold": 0.2}),
        "easy_fraction": OtherValue(0.25, {"easy_fraction": 0.5}),
    },
    "dpo": {**SUPERVISED, "beta": OtherValue(0.5), "samplings": OtherValue(2)},
    "ppo": {
        **SEEDED,
        **OPTIMIZER,
        **LORA,
        **SAMPLER,
        "importance_clip": CoveringTest(
            "test_vllm_sampler.py", "test_the_loss_is_weighted_by_the_ratio_of_policy_to_engine_up_to_the_clip"
        ),
        "preset": OtherValue("deepspeed-chat"),
        "advantage": OtherValue("rloo", {"completions_per_prompt": 2}),
        "completions_per_prompt": OtherValue(2),
        "epochs": OtherValue(0.5),
        "batch_size": OtherValue(4),
        "minibatches": OtherValue(2),
        "epochs_per_batch": OtherValue(2),
        "value_learning_rate": OtherValue(0.02),
        "kl_coef": OtherValue(1.0),
        "kl_target": OtherValue(0.01),
        "kl_budget": OtherValue(0.01),
        "score_clip": OtherValue(0.01),
        "missing_end_penalty": OtherValue(3.0),
        "discount": OtherValue(0.8),
        "gae_lambda": OtherValue(0.5),
        "whiten_advantages": OtherValue(False),
        "clip": OtherValue(1e-3, {"epochs_per_batch": 3}),
        "value_clip": OtherValue(1e-3, {"epochs_per_batch": 3}),
        "value_init": OtherValue("policy"),
        "shared_value_coef": OtherValue(2.0, {"value_init": "shared"}),
        "value_warmup_steps": OtherValue(1),
        "max_kl": OtherValue(1e-6, {"epochs": 3}),
        "max_completion_tokens": OtherValue(4),
    },
    "evaluation": {**SEEDED, **SAMPLER, "prompts": OtherValue(5), "max_completion_tokens": OtherValue(4)},
    "gradients": {"pairs": OtherValue(2)},
    "lora": {
        "rank_stabilized": OtherValue(True, {"rank": 4}),
        "target_modules": OtherValue(("q_proj", "v_proj")),
        "rank": OtherValue(4, {"rank": 2}),
        "alpha": OtherValue(4.0, {"rank": 2}),
        "dropout": OtherValue(0.5, {"rank": 2}),
        "modules_to_save": OtherValue(("norm",)),
        "quantize_base": CoveringTest("test_lora.py", "test_every_stage_trains_on_a_base_in_four_bits"),
    },
    "runtime": {
        name: CoveringTest("test_settings.py", "test_the_runtime_changes_nothing_but_rounding") for name in RUNTIMES
    }
    | {
        name: CoveringTest("test_vllm_sampler.py", "test_a_stage_starts_the_server_that_it_is_told_to_start")
        for name in ("vllm", "vllm_arguments")
    }
    | {
        "workers": CoveringTest("test_workers.py", "test_two_workers_find_what_one_finds"),
        "processes": CoveringTest("test_processes.py", "test_a_stage_is_the_same_in_one_process_and_in_two"),
        "sharded": CoveringTest("test_processes.py", "test_weights_are_cut_and_gathered_where_they_are_needed"),
    },
    "infra": {
        name: CoveringTest("test_cluster.py", "test_what_a_job_asks_for_depends_on_its_stage")
        for name in InfraSettings.model_fields
    }
    | {"jobs": CoveringTest("test_cluster.py", "test_as_many_jobs_as_are_allowed")},
    "stages": {
        name: CoveringTest("test_cluster.py", "test_what_a_job_asks_for_depends_on_its_stage")
        for name in JobSettings.model_fields
    },
}
ACTING = [
    (section, name) for section, lines in TABLE.items() for name, line in lines.items() if isinstance(line, OtherValue)
]


def settings_classes() -> dict[str, type[Settings]]:
    """Every section of a recipe, and the groups of settings inside them, by name."""
    sections: dict[str, type[Settings]] = {}
    waiting = dict(_get_section_types())
    while waiting:
        name, section = waiting.popitem()
        sections[name] = section
        for below, described in section.model_fields.items():
            for kind in (described.annotation, *get_args(described.annotation)):
                if isinstance(kind, type) and issubclass(kind, Settings) and below not in sections:
                    waiting[below] = kind
    del sections["trace"]  # which arms are evaluated, not how a stage computes
    return sections


def test_every_setting_has_its_line() -> None:
    expected = {name: set(section.model_fields) for name, section in settings_classes().items()}
    assert {name: set(lines) for name, lines in TABLE.items()} == expected


def test_the_tests_that_lines_name_are_there() -> None:
    for lines in TABLE.values():
        for line in lines.values():
            if isinstance(line, CoveringTest):
                assert f"def {line.name}(" in (Path(__file__).parent / line.file).read_text()


TIMES = {"seconds", "sampling_seconds", "updating_seconds"}


def outcome(tiny: TinyWorld, stage: Callable[[], Stage]) -> Any:
    """All that a stage leaves: rows, metrics but for times, the model; or the words in which it refused."""
    try:
        out = tiny.run(stage())
    except (InputError, Diverged, ValueError) as error:
        return str(error)
    rows = {file.name: read_table(file) for file in out.glob("*.parquet")}
    lines = [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(out)]
    samples, model = read_jsonl(out / "samples.jsonl"), locate_model_folder(out)
    return rows, lines, samples, compute_model_digest(model) if model.exists() else None


OUTCOMES: dict[str, Any] = {}


def outcome_of(tiny: TinyWorld, section: str, settings: Mapping[str, Any]) -> Any:
    """The outcome of a section's stage, each once."""
    filled = {k: v.format(folder=tiny.folder) if "{folder}" in str(v) else v for k, v in settings.items()}
    if section == "lora":
        section, filled = "sft", {"lora": filled, "epochs": 2}
    key = f"{section} {sorted(filled.items())}"
    if key not in OUTCOMES:
        OUTCOMES[key] = outcome(tiny, lambda: getattr(tiny, section)(**filled))
    return OUTCOMES[key]


@pytest.mark.parametrize(("section", "name"), ACTING)
def test_the_setting_acts(tiny: TinyWorld, section: str, name: str) -> None:
    line = TABLE[section][name]
    assert isinstance(line, OtherValue)
    plain = outcome_of(tiny, section, line.beside)
    other = outcome_of(tiny, section, {**line.beside, name: line.value})
    assert plain != other
    refused = {"on_bad_row": [plain], "max_kl": [other]}.get(name, [])
    assert [error for error in (plain, other) if isinstance(error, str)] == refused


@pytest.mark.parametrize("section", ["sft", "reward", "samples", "dpo", "ppo", "evaluation"])
def test_the_same_settings_give_the_same(tiny: TinyWorld, section: str) -> None:
    """Else a setting that does nothing would seem to act."""
    assert outcome_of(tiny, section, {}) == outcome(tiny, getattr(tiny, section))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {"epochs": 2}) for kind in ("sft", "reward", "dpo", "ppo")),
        ("ppo", {"value_init": "shared"}),
        ("ppo", {"advantage": "rloo", "completions_per_prompt": 2}),
        ("samples", {}),
        ("evaluation", {}),
    ],
)
def test_the_runtime_changes_nothing_but_rounding(
    tiny: TinyWorld, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, Any]
) -> None:
    """Completions are drawn once, by the first run, since rounding may draw others; all runs read the same ones."""
    stage = getattr(tiny, kind)(**settings)
    for source in stage.get_input_stages().values():
        tiny.build(source)
    sampled: dict[Any, Row] = {}
    draw = LocalSampler.draw

    def draw_once(sampler: LocalSampler, prompts: Any, **how: Any) -> Any:
        missing = [prompt for prompt in prompts if (how["seed"], *prompt) not in sampled]
        if missing:
            for prompt, row in zip(missing, rows_of_sample(draw(sampler, missing, **how)), strict=True):
                sampled[how["seed"], *prompt] = row
        return sample_of_rows([sampled[how["seed"], *prompt] for prompt in prompts], sampler.policy.end_tokens)

    monkeypatch.setattr(LocalSampler, "draw", draw_once)
    runs = [tiny.run(stage)]
    for name, value in RUNTIMES.items():
        runs.append(tiny.run(stage, TINY_RUNTIME.model_copy(update={name: value})))
    rounding = {"rel": 2e-3, "abs": 5e-4}
    for name, out in zip(RUNTIMES, runs[1:], strict=True):
        for one, other in zip(read_metrics(runs[0]), read_metrics(out), strict=True):
            decided_by_rounding = {"accuracy"} if kind == "dpo" else set()  # while policy and reference are one
            for key in one.keys() - TIMES - decided_by_rounding:
                assert one[key] == pytest.approx(other[key], **rounding), (name, key, one["step"])
        for file in runs[0].glob("*.parquet"):
            for one, other in zip(read_table(file), read_table(out / file.name), strict=True):
                for key, value in one.items():
                    numbers = isinstance(value, float) or (key == "scores")
                    assert value == (pytest.approx(other[key], **rounding) if numbers else other[key]), (name, key)


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled pairs", "human pairs"])
@pytest.mark.parametrize("reverse", [False, True], ids=["policy is tuned", "reference is tuned"])
def test_dpo_is_trained_against_the_reference_that_it_is_given(tiny: TinyWorld, sampled: bool, reverse: bool) -> None:
    """The first step's figures from plain forward passes of both models, and equation 2 in float64."""
    policy, reference = (tiny.policy, tiny.tuned) if reverse else (tiny.tuned, tiny.policy)
    part = tiny.sampled.pairs if sampled else tiny.pairs.train_pairs
    out = tiny.run(tiny.dpo(policy=policy, reference=reference, pairs=part, beta=0.3, batch_size=64))
    models = [tiny.load(stage) for stage in (policy, reference)]
    rows = part.get_path_within(tiny.build(part.stage))
    pairs = read_pairs(rows, models[0], max_completion_tokens=TINY_LIMIT)
    margins = []
    for prompt, branches in zip(pairs.prompts, pairs.completions, strict=True):
        with torch.no_grad():
            (chosen, rejected), (chosen_reference, rejected_reference) = (
                [float(plain_logprobs(lm.model, prompt, completion).double().sum()) for completion in branches]
                for lm in models
            )
        margins.append(0.3 * ((chosen - chosen_reference) - (rejected - rejected_reference)))
    assert np.abs(margins).max() > 0.1, "policy and reference differ"
    row = read_metrics(out)[0]
    assert row["margin"] == pytest.approx(np.mean(margins), abs=1e-3)
    assert row["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-np.array(margins)))), abs=1e-3)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.868198, 0.55, 0.231802]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_learning_rate_rises_and_falls_as_it_says(tiny: TinyWorld, decay: str, expected: list[float]) -> None:
    """Two steps up, four steps towards a tenth; 0.868198 = 1 - 0.9 (1 - cos(pi / 4)) / 2."""
    settings = OptimizerSettings(learning_rate=1.0, warmup_steps=2, decay=decay)
    rates = [compute_learning_rate(step, total_steps=6, settings=settings) for step in range(6)]
    assert rates == pytest.approx(expected, abs=1e-6)
    steps = {"decay": decay, "warmup_steps": 2, "learning_rate": 1e-3}
    rows = read_metrics(tiny.run(tiny.dpo(**steps, batch_size=16, epochs=6)))
    assert [1e3 * row["learning_rate"] for row in rows] == pytest.approx(expected, abs=1e-6)


def test_ppo_counts_its_optimizer_steps_as_the_others_do(tiny: TinyWorld) -> None:
    """Two iterations of 2 x 2 steps: four up, four down, logged by their means; the value's follow the same course."""
    steps = {"decay": "linear", "warmup_steps": 4, "minibatches": 2, "epochs_per_batch": 2}
    rows = read_metrics(tiny.run(tiny.ppo(**steps, learning_rate=1e-3, value_learning_rate=2e-3)))
    expected = [np.mean([0.25, 0.5, 0.75, 1.0]), np.mean([1.0, 0.775, 0.55, 0.325])]
    assert [1e3 * row["learning_rate"] for row in rows] == pytest.approx(expected)
    assert [5e2 * row["value_learning_rate"] for row in rows] == pytest.approx(expected)


def test_every_epoch_takes_every_row_once_in_an_order_of_its_own() -> None:
    settings = SupervisedSettings(learning_rate=1.0, batch_size=4, epochs=3)
    total = count_optimizer_steps(10, settings)
    steps = [select_batch_rows(step, 10, batch_size=4, seed=0) for step in range(total)]
    assert [len(rows) for rows in steps] == 3 * [4, 4, 2]
    epochs = [[row for rows in steps[first : first + 3] for row in rows] for first in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == 3 * [[*range(10)]]
    assert len({*map(tuple, epochs)}) == 3


def test_sft_counts_as_read_where_its_kl_is_held(tiny: TinyWorld) -> None:
    """Of one iteration the reward model, the reference and the value model read all tokens; SFT where a budget asks."""
    stage = {"policy": tiny.tuned, "reference": tiny.tuned, "epochs": 0.5}
    free, held = (read_stage_summary(tiny.run(tiny.ppo(**stage, **more)))["cost"] for more in ({}, {"kl_budget": 1.0}))
    assert 3 * held["tokens_scored"] == 4 * free["tokens_scored"] > 0


@pytest.mark.parametrize(
    ("prompts", "iterations", "settings", "expected"),
    [
        (16, 4, {}, [0, 1, 2, 3, 4]),
        (16, 4, {"minibatches": 2, "epochs_per_batch": 3}, [0, 6, 12, 18, 24]),
        (14, 3, {"batch_size": 6, "minibatches": 4}, [0, 3, 6, 8]),  # minibatches of 2, 2, 2; of 2, 2, 2; of 1, 1
    ],
)
def test_optimizer_steps_of_iterations(
    prompts: int, iterations: int, settings: dict[str, int], expected: list[int]
) -> None:
    ppo = PPOSettings(**{"batch_size": 8, **settings})
    assert count_updates_before_iterations(ppo, prompts, iterations) == expected


def test_a_revision_is_the_commit_that_is_asked_for(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        original = auto.from_pretrained

        def loading(name: Any, *, original: Any = original, revision: Any = None, **others: Any) -> Any:
            loads.append((str(name), revision, others.get("trust_remote_code")))
            return original(tiny.folder / "base" if name == "some/model" else name, **others)

        monkeypatch.setattr(auto, "from_pretrained", loading)
    Pretrained(path="some/model", revision="abc").compute({}, StageJob(tmp_path, TINY_RUNTIME))
    assert loads.count(("some/model", "abc", False)) == 2, "and with no code of its own"
