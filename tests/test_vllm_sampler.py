"""The sampler by a vLLM server: what is handed over, what is compared, and what its failures say.

Against a server that computes with transformers and peft (`fake_vllm.py`), and at the end against vLLM itself.
"""

import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_vllm import FakeVLLM, write_python_with_fake_vllm
from mixpo.data.errors import InputError
from mixpo.experiments.recipe import Recipe
from mixpo.models import adapter_folders, vllm_sampler
from mixpo.models.adapters import LoraSettings, add_lora
from mixpo.models.digests import compute_model_digest
from mixpo.models.language_model import LanguageModel
from mixpo.models.loading import ModelLoader
from mixpo.models.samplers import LocalSampler, Sampler
from mixpo.models.sampling import compute_truncated_probabilities
from mixpo.models.vllm_sampler import VLLMSampler
from mixpo.models.vllm_server import VLLMServer
from mixpo.models.weight_types import freeze_network
from mixpo.stages.identity import make_stage_folder_name
from mixpo.stages.ppo_settings import PPOSettings
from mixpo.stages.rows import read_table, read_table_metadata
from mixpo.training.job import SAMPLING, StageJob, locate_model_folder
from mixpo.training.record import read_metrics
from mixpo.training.runtime import Runtime
from models import assert_plain_logprobs
from models import tiny as tiny_model
from test_sampling import agrees
from worlds import CPU, TinyWorld, World

PROMPTS = [[3, 9, 4, 11, 7, 8, 9, 10], [12, 13], [20, 21, 22, 23, 24]]
OPTIONS: dict[str, Any] = {"k": 2, "max_tokens": 8}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Llama's folder."""
    tiny_model("llama").model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def server(base: Path) -> Iterator[FakeVLLM]:
    fake = FakeVLLM(base)
    yield fake
    fake.close()


def make_policy(base: Path, *, lora: bool) -> LanguageModel:
    lm = tiny_model("llama")
    lm.folder = base
    if lora:
        freeze_network(lm.network)
        add_lora(lm, LoraSettings(rank=3, alpha=5.0, rank_stabilized=True))
    return lm


def move(lm: LanguageModel, size: float, seed: int) -> None:
    """Change all trained weights a little, or much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def make_sampler(server: FakeVLLM, folder: Path, **options: Any) -> VLLMSampler:
    return VLLMSampler(server.address, folder=folder / "handed over", cache_bytes=2**20, **options)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_completions_follow_the_policy(server: FakeVLLM, base: Path, tmp_path: Path, lora: bool) -> None:
    """At every hand-over, of a few changes: log-probs are those of the policy's own forward pass."""
    lm, sampler = make_policy(base, lora=lora), make_sampler(server, tmp_path)
    drawn = []
    for number in range(3):
        move(lm, 0.1, number)
        sampler.load_policy(lm)
        sampled = sampler.draw(PROMPTS, **OPTIONS, seed=0)
        assert_plain_logprobs(lm.model, PROMPTS, sampled.to_lists(), sampled.logprobs, 1e-4)
        drawn.append(sampled.to_lists())
    assert drawn[0] != drawn[1] != drawn[2]
    paths = [path for path, _ in server.requests]
    if lora:
        names = [body["lora_name"] for path, body in server.requests if path == "/v1/load_lora_adapter"]
        assert len(set(names)) == 3
        assert [body["lora_name"] for path, body in server.requests if "unload" in path] == names[:2]
        assert "/collective_rpc" not in paths
    else:
        assert paths.count("/collective_rpc") == 3
    sampler.close()
    assert not sampler.folder.exists()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("size", [1e-6, 0.1])
def test_a_server_that_keeps_the_policy_before_is_refused(
    server: FakeVLLM, base: Path, tmp_path: Path, lora: bool, size: float
) -> None:
    """Also if the update moved log-probs by far less than the tolerance."""
    lm, sampler = make_policy(base, lora=lora), make_sampler(server, tmp_path)
    move(lm, 0.1, 0)
    sampler.load_policy(lm)
    sampler.draw(PROMPTS, **OPTIONS, seed=0)
    move(lm, size, 1)
    sampler.load_policy(lm)
    sampler.draw(PROMPTS, **OPTIONS, seed=0)
    server.ignores_hand_over = True
    expected = "found log-probs of an earlier policy" if size == 1e-6 else "nats a token from the policy's own"

    def train_on() -> None:
        for number in range(2, 40):  # rounding hides the first ones
            move(lm, size, number)
            sampler.load_policy(lm)
            sampler.draw(PROMPTS, **OPTIONS, seed=0)

    with pytest.raises(InputError, match=expected):
        train_on()


def test_small_updates_that_a_server_missed_add_up(server: FakeVLLM, base: Path, tmp_path: Path) -> None:
    """Each moves log-probs by less than those of server and policy differ anyway, by its other rounding."""

    def round_otherwise(choice: dict[str, Any]) -> None:
        logprobs = choice["logprobs"]["token_logprobs"]
        logprobs[1:] = [value + 3e-4 * (-1) ** place for place, value in enumerate(logprobs[1:])]

    def train(steps: int) -> None:
        for number in range(steps):
            move(lm, 5e-6, 1)
            sampler.load_policy(lm)
            sampler.draw(PROMPTS, **OPTIONS, seed=0)
            handed_over.append(number)

    handed_over = list[int]()
    server.change_choice = round_otherwise
    lm, sampler = make_policy(base, lora=False), make_sampler(server, tmp_path)
    train(steps=10)
    server.ignores_hand_over = True
    with pytest.raises(InputError, match="found log-probs of an earlier policy"):
        train(steps=60)
    assert len(handed_over) > 12, "the first ones are too small to tell"


def test_nothing_is_handed_over_that_did_not_change(server: FakeVLLM, base: Path, tmp_path: Path) -> None:
    """Several draws after one hand-over; random numbers are those of seed, prompt, occurrence and branch."""
    lm, sampler = make_policy(base, lora=False), make_sampler(server, tmp_path)
    sampler.load_policy(lm)
    together = sampler.draw(PROMPTS, **OPTIONS, seed=7).to_lists()
    apart = [sampler.draw([prompt], **OPTIONS, seed=7).to_lists()[0] for prompt in PROMPTS]
    assert together == apart
    assert [path for path, _ in server.requests].count("/collective_rpc") == 1
    seeds = [body["seed"] for path, body in server.requests if path == "/v1/completions" and "echo" not in body]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_nothing_is_left_to_the_servers_defaults(server: FakeVLLM, base: Path, tmp_path: Path) -> None:
    lm, sampler = make_policy(base, lora=False), make_sampler(server, tmp_path)
    lm.end_tokens = frozenset({5, 17})
    lm.unused_tokens = (88,)
    sampler.load_policy(lm)
    sampler.draw(PROMPTS[:1], k=1, max_tokens=3, seed=0, temperature=0.5, top_k=7, top_p=0.9)
    request = server.requests[-1][1]
    seed, salt = request.pop("seed"), request.pop("cache_salt")
    assert request == {
        "model": "base",
        "prompt": PROMPTS[0],
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stop_token_ids": [5, 17],
        "ignore_eos": True,
        "logit_bias": {"88": -100.0},
    }
    assert isinstance(seed, int)
    sampler.load_policy(lm)
    sampler.draw(PROMPTS[:1], k=1, max_tokens=3, seed=0)
    assert server.requests[-1][1]["cache_salt"] != salt, "keys and values of an earlier policy are not used"


def test_a_server_of_another_kind_serves_a_policy_that_is_not_trained(
    server: FakeVLLM, base: Path, tmp_path: Path
) -> None:
    """Here one that speaks SGLang's protocol; it must have been started on the policy's folder."""
    server.is_sglang = True
    lm = make_policy(base, lora=False)
    freeze_network(lm.network)
    sampler = make_sampler(server, tmp_path)
    for top_k in (0, 7):
        sampler.load_policy(lm)
        sampled = sampler.draw(PROMPTS, **OPTIONS, seed=0, top_k=top_k)
        assert_plain_logprobs(lm.model, PROMPTS, sampled.to_lists(), sampled.logprobs, 1e-4)
    assert {path for path, _ in server.requests} == {"/version", "/v1/models", "/v1/completions"}
    sampler.close()


@pytest.mark.parametrize(
    ("root", "found"), [("/elsewhere", "/elsewhere"), (None, "a model without a folder")], ids=["elsewhere", "unnamed"]
)
def test_a_server_of_another_kind_is_one_of_the_policys_folder(
    server: FakeVLLM, base: Path, tmp_path: Path, root: str | None, found: str
) -> None:
    server.is_sglang, server.root = True, root
    lm = make_policy(base, lora=False)
    freeze_network(lm.network)
    sampler = make_sampler(server, tmp_path)
    sampler.load_policy(lm)
    with pytest.raises(InputError, match=f"found a server of {found} that is no vLLM; expected one of {base}, or vLLM"):
        sampler.draw(PROMPTS, **OPTIONS, seed=0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_server_of_another_kind_takes_over_no_policy(
    server: FakeVLLM, base: Path, tmp_path: Path, lora: bool
) -> None:
    server.is_sglang = True
    sampler = make_sampler(server, tmp_path)
    sampler.load_policy(make_policy(base, lora=lora))
    expected = "a server that is no vLLM; expected a vLLM server of" if lora else "that is no vLLM; expected one of"
    with pytest.raises(InputError, match=expected):
        sampler.draw(PROMPTS, **OPTIONS, seed=0)


def _lower(choice: dict[str, Any]) -> None:
    """What a processed log-prob would be, say."""
    choice["logprobs"]["token_logprobs"] = [(value or 0.0) - 0.01 for value in choice["logprobs"]["token_logprobs"]]


def _end_early(choice: dict[str, Any]) -> None:
    """A completion that ended before its time."""
    if len(choice["token_ids"]) > 1:
        choice.update(token_ids=[50], logprobs={"token_logprobs": [-1.0]}, finish_reason="abort")


FAILURES: dict[str, tuple[Callable[[FakeVLLM], Any], str]] = {
    "another version": (
        lambda fake: setattr(fake, "version", "0.12.0"),
        r"http://127\.0\.0\.1:\d+: found vLLM 0\.12\.0; expected 0\.32 to 0\.33, whose protocol mixpo speaks",
    ),
    "no vLLM": (
        lambda fake: setattr(fake, "version", None),
        "that is no vLLM; expected one of .*, or vLLM, which takes over",
    ),
    "no development mode": (
        lambda fake: fake.missing_paths.add("/collective_rpc"),
        r"found status 404 of /collective_rpc \(Not Found\); expected a server with .* VLLM_SERVER_DEV_MODE=1",
    ),
    "another model": (
        lambda fake: setattr(fake, "ignores_hand_over", True),
        "nats a token from the policy's own at the h",
    ),
    "shifted log-probs": (lambda fake: setattr(fake, "change_choice", _lower), r"found log-probs 0\.01 nats a token"),
    "no token ids": (
        lambda fake: setattr(fake, "change_choice", lambda choice: choice.update(token_ids=None)),
        "found a completion without token_ids; expected token ids and log-probs",
    ),
    "no log-probs": (
        lambda fake: setattr(fake, "change_choice", lambda choice: choice.pop("logprobs")),
        "found an answer to /v1/completions without log-probs",
    ),
    "aborted": (
        lambda fake: setattr(fake, "change_choice", _end_early),
        "found a completion that finished by 'abort' after 1 tokens; expected an end token, or 8 tokens",
    ),
    "an unused token": (
        lambda fake: setattr(fake, "change_choice", lambda choice: choice["token_ids"].__setitem__(0, 88)),
        "found a completion with the token 88; expected none that the tokenizer does not have",
    ),
    "a hang": (
        lambda fake: setattr(fake, "hangs", lambda body: True),
        r"found no answer to /version in 1 s; expected a vLLM server's answer",
    ),
    "an end": (
        lambda fake: fake.close(),
        r"found no answer to /version \(.*refused\); expected a vLLM server's answer",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_in_one_line(server: FakeVLLM, base: Path, tmp_path: Path, failure: str) -> None:
    cause, message = FAILURES[failure]
    lm = make_policy(base, lora=False)
    lm.unused_tokens = (88,)
    move(lm, 0.1, 0)
    sampler = make_sampler(server, tmp_path, request_seconds=1.0)
    sampler.load_policy(lm)
    cause(server)
    with pytest.raises(InputError, match=message) as caught:
        sampler.draw(PROMPTS, **OPTIONS, seed=0)
    assert "\n" not in str(caught.value)
    if failure == "an end":
        server.server = FakeVLLM(base).server


def test_a_server_without_adapters_says_how_to_start_it(server: FakeVLLM, base: Path, tmp_path: Path) -> None:
    server.missing_paths.add("/v1/load_lora_adapter")
    sampler = make_sampler(server, tmp_path)
    sampler.load_policy(make_policy(base, lora=True))
    with pytest.raises(InputError) as caught:
        sampler.draw(PROMPTS, **OPTIONS, seed=0)
    assert str(caught.value) == (
        f"{server.address}: found status 404 of /v1/load_lora_adapter (Not Found); expected a vLLM server of {base} "
        f"that reads {sampler.folder}/1, with --enable-lora --max-lora-rank 3 and the environment variable "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1; see docs/vllm.md"
    )


def test_one_server_takes_over_policies_with_and_without_adapters(server: FakeVLLM, base: Path, tmp_path: Path) -> None:
    sampler = make_sampler(server, tmp_path)
    for lora in (True, False):
        lm = make_policy(base, lora=lora)
        move(lm, 0.1, 0)
        sampler.load_policy(lm)
        sampled = sampler.draw(PROMPTS, **OPTIONS, seed=0)
        assert_plain_logprobs(lm.model, PROMPTS, sampled.to_lists(), sampled.logprobs, 1e-4)


def test_adapters_are_summed_once_a_hand_over(
    server: FakeVLLM, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed = list[int]()
    lm, sampler = make_policy(base, lora=True), make_sampler(server, tmp_path)
    original = adapter_folders.collect_adapter_weights

    def collect(lm: LanguageModel) -> dict[str, torch.Tensor]:
        summed.append(1)
        return original(lm)

    for module in (adapter_folders, vllm_sampler):
        monkeypatch.setattr(module, "collect_adapter_weights", collect, raising=False)
    sampler.load_policy(lm)
    sampler.draw(PROMPTS, **OPTIONS, seed=0)
    assert summed == [1]


def test_modules_that_train_whole_are_refused(server: FakeVLLM, base: Path, tmp_path: Path) -> None:
    """An adapter of vLLM's has none."""
    lm, sampler = make_policy(base, lora=False), make_sampler(server, tmp_path)
    add_lora(lm, LoraSettings(rank=3, modules_to_save=("norm",)))
    sampler.load_policy(lm)
    with pytest.raises(InputError, match=r"found vllm with an adapter that has model.norm.weight, which trains whole"):
        sampler.draw(PROMPTS, **OPTIONS, seed=0)


def test_what_the_server_says_is_passed_on(server: FakeVLLM, base: Path, tmp_path: Path) -> None:
    sampler = make_sampler(server, tmp_path)
    sampler.load_policy(make_policy(base, lora=False))
    with pytest.raises(
        InputError, match=r"found status 400 of /v1/completions .*cannot be greater than max_model_len=128"
    ):
        sampler.draw(PROMPTS, k=1, max_tokens=500, seed=0)


def test_a_server_that_was_restarted_between_two_draws_is_refused(server: FakeVLLM, base: Path, tmp_path: Path) -> None:
    """It computes the model that it was started with."""
    lm, sampler = make_policy(base, lora=False), make_sampler(server, tmp_path)
    original = server.models["base"]
    move(lm, 0.1, 0)
    sampler.load_policy(lm)
    sampler.draw(PROMPTS, **OPTIONS, seed=0)
    server.models["base"] = original
    with pytest.raises(InputError, match=r"at a draw; expected at most 0.001: the server computes another model"):
        sampler.draw(PROMPTS, **OPTIONS, seed=0)


# --- started servers


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A Python whose vLLM is the server of these tests."""
    return write_python_with_fake_vllm(tmp_path)


def test_a_server_is_started_on_the_policy_and_ends_with_the_sampler(python: str, base: Path, tmp_path: Path) -> None:
    lm = make_policy(base, lora=False)
    move(lm, 0.1, 0)
    sampler = VLLMSampler(python, folder=tmp_path / "sampling", cache_bytes=12345, arguments=["--seed", "1"])
    sampler.load_policy(lm)
    sampled = sampler.draw(PROMPTS, **OPTIONS, seed=0)
    assert_plain_logprobs(lm.model, PROMPTS, sampled.to_lists(), sampled.logprobs, 1e-4)
    assert sampler.server is not None
    assert sampler.server.process is not None
    command = (tmp_path / "vllm.log").read_text()
    for part in ("--dtype float32", "--kv-cache-memory-bytes 12345", "--seed 1", "--generation-config vllm"):
        assert part in command
    os.killpg(sampler.server.process.pid, signal.SIGKILL)
    with pytest.raises(
        InputError, match=r"vLLM, started by runtime.vllm: found no answer .*\(it ended with status -9\)"
    ):
        sampler.draw(PROMPTS, **OPTIONS, seed=0)
    sampler.close()


# --- stages


@pytest.fixture
def by_server(tiny: TinyWorld) -> Iterator[tuple[FakeVLLM, Runtime]]:
    """A server that starts with the small world's SFT model, and a runtime that names it."""
    fake = FakeVLLM(locate_model_folder(tiny.build(tiny.policy)))
    yield fake, Runtime(device="cpu", threads=1, checkpoint_minutes=0, vllm=fake.address)
    fake.close()


def test_a_stage_starts_the_server_that_it_is_told_to_start(tiny: TinyWorld, python: str) -> None:
    runtime = Runtime(device="cpu", threads=1, vllm=python, vllm_arguments=("--seed", "1"))
    tiny.build(tiny.scored_by)
    out, job = tiny.folder / "runs" / "starts", None
    out.mkdir(parents=True)
    job = StageJob(out, runtime)
    stage = tiny.samples(sampler="vllm")
    stage.compute(stage.locate_inputs({n: tiny.build(s) for n, s in stage.get_input_stages().items()}), job)
    assert (out / "vllm.log").read_text().split("\n")[0].endswith("--seed 1")
    job.close()
    assert not (out / SAMPLING).exists()


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_ppo_learns_from_the_servers_completions(
    tiny: TinyWorld, by_server: tuple[FakeVLLM, Runtime], lora: dict[str, int] | None
) -> None:
    """Which here computes what the policy does, so that the mismatch is rounding."""
    fake, runtime = by_server
    rows = read_metrics(tiny.run(tiny.ppo(sampler="vllm", lora=lora), runtime))
    assert len(rows) == 2
    for row in rows:
        assert 0 <= row["sampler_kl"] < 1e-8
        assert 1 <= row["sampler_max_ratio"] < 1.001
        assert row["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert abs(rows[0]["kl"]) < 1e-4 < abs(rows[1]["kl"]), "the first policy is its reference, the second is not"
    assert sum(path in ("/collective_rpc", "/v1/load_lora_adapter") for path, _ in fake.requests) == 2


def _draw_as_another_engine(monkeypatch: pytest.MonkeyPatch, shift: float) -> None:
    """Local draws whose log-probs are `shift` lower than the policy's, and so the ratio exp(shift)."""

    class SamplerWithShiftedLogprobs(LocalSampler):
        def draw(self, *args: Any, **options: Any) -> Any:
            sampled = super().draw(*args, **options)
            return type(sampled)(sampled.tokens, sampled.mask, (sampled.logprobs - shift) * sampled.mask, sampled.ended)

    def get_sampler(job: StageJob, name: str = "local") -> Sampler:
        return SamplerWithShiftedLogprobs(cache_bytes=2**30) if name == "vllm" else LocalSampler(cache_bytes=2**30)

    monkeypatch.setattr(StageJob, "get_sampler", get_sampler)


@pytest.mark.parametrize(("clip", "weight"), [(None, 1.0), (1.2, 1.2), (4.0, math.exp(0.5))])
def test_the_loss_is_weighted_by_the_ratio_of_policy_to_engine_up_to_the_clip(
    tiny: TinyWorld, monkeypatch: pytest.MonkeyPatch, clip: float | None, weight: float
) -> None:
    """The same ratio for all tokens: the first loss is that of the policy's own draws, times the weight."""
    local = read_metrics(tiny.run(tiny.ppo(whiten_advantages=False)))[0]
    _draw_as_another_engine(monkeypatch, 0.5)
    row = read_metrics(tiny.run(tiny.ppo(sampler="vllm", importance_clip=clip, whiten_advantages=False)))[0]
    assert local["policy_loss"] != 0
    assert row["policy_loss"] == pytest.approx(weight * local["policy_loss"], rel=1e-3)
    assert row["sampler_max_ratio"] == pytest.approx(math.exp(0.5), rel=1e-3)
    assert row["sampler_kl"] == pytest.approx(math.exp(0.5) - 1 - 0.5, rel=1e-3)
    assert row["kl"] == pytest.approx(local["kl"], abs=1e-5), "by the policy's own log-probs"


def test_weights_for_an_engine_are_refused_without_one() -> None:
    with pytest.raises(ValueError, match="importance_clip: found 2 with sampler: local, which draws from the policy"):
        PPOSettings(importance_clip=2.0)


def test_ppo_goes_on_after_its_server_died(tiny: TinyWorld, by_server: tuple[FakeVLLM, Runtime]) -> None:
    """With another server, to the same metrics as without the death."""
    fake, runtime = by_server
    stage = tiny.ppo(sampler="vllm", epochs=2)
    whole = tiny.run(stage, runtime)
    hand_overs = 0

    def die_at_the_third_hand_over(path: str, body: Any) -> tuple[int, Any]:
        nonlocal hand_overs
        hand_overs += path == "/collective_rpc"
        return (500, {"error": {"message": "EngineDeadError"}}) if hand_overs == 3 else answer(path, body)

    answer, fake.answer = fake.answer, die_at_the_third_hand_over  # type: ignore[method-assign]
    out = tiny.folder / "runs" / "died"
    with pytest.raises(
        InputError, match=r"found status 500 of /collective_rpc .EngineDeadError.*start it again, and run"
    ):
        tiny.compute(stage, out, runtime)
    assert len(read_metrics(out)) == 2
    another = FakeVLLM(fake.base)
    tiny.compute(stage, out, runtime.model_copy(update={"vllm": another.address}))
    another.close()
    times = {"seconds", "sampling_seconds", "updating_seconds"}
    for one, other in zip(read_metrics(whole), read_metrics(out), strict=True):
        assert {k: v for k, v in one.items() if k not in times} == pytest.approx(
            {k: v for k, v in other.items() if k not in times}, rel=1e-3, abs=1e-4
        )


def test_samples_of_a_server_give_no_reference_logprobs(tiny: TinyWorld, by_server: tuple[FakeVLLM, Runtime]) -> None:
    """DPO computes them itself; those that a policy's own sampler kept are used."""
    _, runtime = by_server
    local, served = (tiny.samples(sampler=name) for name in ("local", "vllm"))
    assert make_stage_folder_name(local) == make_stage_folder_name(tiny.samples())
    assert make_stage_folder_name(local) != make_stage_folder_name(served)
    digest = compute_model_digest(locate_model_folder(tiny.build(tiny.policy)))
    file = tiny.run(served, runtime) / "pairs.parquet"
    assert read_table_metadata(file)["sampler"] == f"{digest} float32 vllm"
    assert read_table_metadata(tiny.run(local) / "pairs.parquet")["sampler"] == f"{digest} float32"
    lm = tiny.load(tiny.policy)
    for row in read_table(file):
        logprobs = torch.nn.utils.rnn.pad_sequence([torch.tensor(values) for values in row["logprobs"]], True)
        assert_plain_logprobs(lm.model, [row["prompt_tokens"]], [row["tokens"]], logprobs[None], 1e-4)


def test_an_evaluations_kl_is_by_the_policys_own_logprobs(tiny: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    local = read_table(tiny.run(tiny.evaluation()) / "completions.parquet")
    _draw_as_another_engine(monkeypatch, 0.5)
    served = read_table(tiny.run(tiny.evaluation(sampler="vllm")) / "completions.parquet")
    assert [row["completion"] for row in served] == [row["completion"] for row in local]
    for one, other in zip(served, local, strict=True):
        assert one["kl_from_sft"] == pytest.approx(other["kl_from_sft"], abs=1e-4)


def test_a_recipe_sets_the_sampler_once_for_all_stages_that_sample() -> None:
    recipe = Recipe(name="a", arms=("mpo",), selection={"threshold": 1.0}, sampler="vllm", ppo={"sampler": "local"})
    assert (recipe.samples.sampler, recipe.evaluation.sampler, recipe.ppo.sampler) == ("vllm", "vllm", "local")


def test_a_stage_without_a_server_says_what_to_set(tiny: TinyWorld) -> None:
    with pytest.raises(
        InputError, match=r"runtime.vllm: found nothing, with sampler: vllm; expected the address of a vLLM"
    ):
        tiny.run(tiny.samples(sampler="vllm"))
    with pytest.raises(InputError, match=r"runtime.vllm: found nothing"):
        Runtime().check_vllm(is_here=True)


def test_a_stage_leaves_nothing_that_was_handed_over(tiny: TinyWorld, by_server: tuple[FakeVLLM, Runtime]) -> None:
    _, runtime = by_server
    cache = type(tiny.stage_cache)(tiny.stage_cache.cache, runtime)
    out = cache.compute_with_inputs(tiny.ppo(sampler="vllm", seed=3))
    assert not (out / SAMPLING).exists()


# --- vLLM itself

PYTHON = os.environ.get("MIXPO_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(not PYTHON, reason="MIXPO_VLLM_PYTHON names no Python that has vLLM (docs/vllm.md)")
PLAIN = "--enforce-eager"
"""Compiling takes a server longer than these tests compute."""


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[VLLMSampler]:
    sampler = VLLMSampler(PYTHON, folder=tmp_path / "sampling", cache_bytes=2**28, arguments=[PLAIN])
    yield sampler
    sampler.close()


def assert_same_mean(one: torch.Tensor, other: torch.Tensor) -> None:
    """Of independent numbers, within 4 standard errors."""
    error = (one.var() / len(one) + other.var() / len(other)).sqrt()
    assert abs(float(one.mean() - other.mean())) < 4 * float(error)


@pytest.mark.heavy
@needs_vllm
@pytest.mark.parametrize(("kind", "precision"), [("full", "float32"), ("lora", "float32"), ("full", "bfloat16")])
def test_vllm_draws_from_the_distribution_that_we_draw_from(
    world: World, vllm: VLLMSampler, kind: str, precision: Any
) -> None:
    """From a policy and from the one after an update, the very same server: first tokens by chi-square against the
    exact probabilities; log-probs, lengths, ends and the most frequent tokens of completions against ours."""
    folder = locate_model_folder(world.build(world.sft))
    lora = LoraSettings(rank=4) if kind == "lora" else None
    lm = ModelLoader(CPU).load_trainable_policy(folder, precision, lora)
    rows = read_table(world.build(world.data) / "test.parquet", ["prompt_tokens"])
    prompts = [row["prompt_tokens"] for row in rows[:12]]
    local = LocalSampler(cache_bytes=2**28)
    local.load_policy(lm)
    tolerance = 1e-3 if precision == "float32" else 0.5
    for update in range(2):
        move(lm, 0.02, update)
        vllm.load_policy(lm)
        firsts = vllm.draw(prompts[:1], k=1000, max_tokens=1, seed=update)
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor(prompts[:1])).logits[0, -1].double()
        counts = np.bincount(firsts.tokens.flatten(), minlength=len(logits))
        assert agrees(counts, logits.softmax(-1).numpy())
        drawn = [sampler.draw(prompts, k=40, max_tokens=24, seed=update) for sampler in (vllm, local)]
        assert_plain_logprobs(lm.model, prompts[:3], drawn[0].to_lists()[:3], drawn[0].logprobs[:3], tolerance)
        for measure in (
            lambda sampled: sampled.logprobs.sum(-1),
            lambda sampled: sampled.lengths.double(),
            lambda sampled: sampled.ended.double(),
        ):
            # the mean over prompts of each branch: branches are independent
            assert_same_mean(*(measure(sampled).mean(dim=0) for sampled in drawn))
        frequent = torch.bincount(drawn[1].tokens[drawn[1].mask]).argsort(descending=True)[:10]
        for token in frequent.tolist():
            assert_same_mean(*((sampled.tokens == token).double().sum(-1).mean(dim=0) for sampled in drawn))
        again = vllm.draw(prompts[:3], k=2, max_tokens=24, seed=update).to_lists()
        assert [branches[:2] for branches in drawn[0].to_lists()[:3]] == again or precision == "bfloat16"


@pytest.mark.heavy
@needs_vllm
def test_vllm_keeps_what_a_sampler_promises(world: World, vllm: VLLMSampler) -> None:
    """Truncation, several end tokens, tokens that are never drawn, and log-probs at temperature 1."""
    lm = world.load(world.sft)
    vllm.load_policy(lm)
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    for settings in ({"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 10}, {"top_k": 30, "top_p": 0.5}):
        sampled = vllm.draw(PROMPTS[:1], k=600, max_tokens=1, seed=0, **settings)
        tokens = sampled.tokens[0, :, 0]
        probabilities = compute_truncated_probabilities(
            logits[None], **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, **settings}
        )[0].numpy()
        kept = probabilities > 0
        counts = np.bincount(tokens, minlength=len(logits))
        assert not counts[~kept].any()
        assert agrees(counts[kept], probabilities[kept])
        own = logits.log_softmax(-1)[tokens].float()
        torch.testing.assert_close(sampled.logprobs[0, :, 0], own, rtol=1e-3, atol=1e-3)
    frequent = logits.argsort(descending=True)[:3].tolist()
    lm.unused_tokens, lm.end_tokens = (frequent[0],), lm.end_tokens | {frequent[1], frequent[2]}
    sampled = vllm.draw(PROMPTS[:1], k=300, max_tokens=20, seed=1)
    completions = sampled.to_lists()[0]
    assert {completion[-1] for completion in completions if len(completion) < 20} >= {frequent[1], frequent[2]}
    assert not any(set(completion[:-1]) & lm.end_tokens for completion in completions)
    assert not any(frequent[0] in completion for completion in completions)
    assert_plain_logprobs(lm.model, PROMPTS[:1], [completions], sampled.logprobs, 1e-3)


@pytest.mark.heavy
@needs_vllm
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_ppo_through_vllm(world: World, tmp_path: Path, lora: dict[str, int] | None) -> None:
    """It follows the policy at every iteration; the first, of the same policy, scores what our own draws do."""
    settings: dict[str, Any] = {"lora": lora, "epochs": 2, "learning_rate": 1e-4 if lora is None else 2e-3}
    runtime = Runtime(threads=1, checkpoint_minutes=100, vllm=PYTHON, vllm_arguments=(PLAIN,))
    stage = world.ppo(sampler="vllm", importance_clip=2.0, **settings)
    served = read_metrics(world.compute(stage, tmp_path / "vllm", runtime))
    local = read_metrics(world.compute(world.ppo(**settings), tmp_path / "local", runtime))
    assert len(served) == len(local) >= 4
    for row in served:
        assert 0 <= row["sampler_kl"] < 1e-6
        assert 1 <= row["sampler_max_ratio"] < 1.01
        assert row["ratio"] == pytest.approx(1.0, abs=1e-4)
    error = math.hypot(*(rows[0]["score_std"] / math.sqrt(rows[0]["completions"]) for rows in (served, local)))
    assert abs(served[0]["score"] - local[0]["score"]) < 4 * error
    assert served[0]["kl_abs_per_token"] < 1e-4 < 1e-3 < served[-1]["kl_abs_per_token"], "the policy has moved"


@pytest.mark.heavy
@needs_vllm
def test_a_vllm_that_dies_ends_the_stage_which_goes_on_when_it_is_run_again(world: World, tmp_path: Path) -> None:
    runtime = Runtime(threads=1, checkpoint_minutes=0, vllm=PYTHON, vllm_arguments=(PLAIN,))
    stage = world.ppo(sampler="vllm", epochs=2)
    ask = VLLMServer._request_json
    paths = list[str]()

    def die(server: VLLMServer, path: str, body: Any = None, *expected: str) -> Any:
        """Kill the server in the middle of the second iteration's draw, as its system would."""
        drawn = isinstance(body, dict) and "echo" not in body and "/collective_rpc" in paths
        paths.append(f"{path} of the second draw" if drawn else path)
        if paths.count("/v1/completions of the second draw") == 5:
            assert server.process is not None
            os.killpg(server.process.pid, signal.SIGKILL)
        return ask(server, path, body, *expected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLLMServer, "_request_json", die)
        with pytest.raises(InputError, match=r"vLLM, started by runtime.vllm: found no answer .* ended with status -9"):
            world.compute(stage, tmp_path / "out", runtime)
    assert len(read_metrics(tmp_path / "out")) == 1
    world.compute(stage, tmp_path / "out", runtime)
    assert [row["step"] for row in read_metrics(tmp_path / "out")] == list(range(len(read_metrics(tmp_path / "out"))))
