"""Data: rows read, validated and cut to size once, before anything trains."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

import pydantic

from mixpo.data.errors import InputError
from mixpo.data.rows import FIX, BadRow, Demonstration, Preference, Prompt, RowError, kind_of, refuse
from mixpo.data.sources import (
    Check,
    content_digest,
    read_demonstrations,
    read_hub_demonstrations,
    read_hub_preferences,
    read_preferences,
    write_rows,
)
from mixpo.data.tokens import check_prompts, check_tokenizer, prompt_tokens
from mixpo.data.world import WORLD_VERSION, make_world
from mixpo.models.folders import load_tokenizer
from mixpo.settings import Settings
from mixpo.stages.stage import Part, Stage, finish, model_in
from mixpo.training.record import Cost, append_jsonl, watcher
from mixpo.training.runtime import Runtime


class DataSettings(Settings):
    """Where preference rows and demonstrations come from."""

    format: Literal["world", "preference", "hh-rlhf", "tldr"] = "world"
    """`world` is generated; `preference` has `prompt`, `chosen`, `rejected`; the others are their publishers' rows."""
    train: tuple[str, ...] = ()
    """Files (.jsonl, .jsonl.gz, .json, .parquet, .csv), or `hub:NAME` or `hub:NAME/DATA_DIR`, of preference rows."""
    test: tuple[str, ...] = ()
    """The same for held-out rows; if empty, `test_share` of the train prompts is held out."""
    demonstrations: tuple[str, ...] = ()
    """Files with `prompt` and `completion` for SFT; if empty, the chosen completions of train."""
    second: tuple[str, ...] = ()
    """The same as train for a second reward model, which only measures; see `second_rows`."""
    revision: str | None = None
    """The commit of a hub data set. Without it a cache knows the set by its name alone, whatever it held that day."""
    train_rows: int | None = pydantic.Field(None, ge=1)
    """Use so many preference rows (drawn by `data_seed`); all if not given. For the world: how many to make."""
    test_rows: int | None = pydantic.Field(None, ge=1)
    demonstration_rows: int | None = pydantic.Field(None, ge=1)
    test_share: float = pydantic.Field(0.1, gt=0, lt=1)
    second_rows: int = pydantic.Field(0, ge=0)
    """So many preference rows for a second reward model, none of whose prompts is in train or test: drawn from
    `second`, or, if that is empty, about so many kept apart from train. With 0 there is no second reward model."""
    special_tokens: Literal["text", "parse"] = "text"
    """What names of control tokens such as `</s>` are in prompts: `text`, so that no row can end or forge a turn, or
    `parse`, for prompts that were rendered before. In completions they are text."""
    max_prompt_tokens: int = pydantic.Field(512, ge=1)
    """A longer prompt is a bad row."""
    on_bad_row: Literal["error", "drop"] | None = None
    """`error` names the first ten and stops; `drop` counts them and lists them in `bad_rows.jsonl`.
    If not given: `drop` for hh-rlhf, whose raw rows hold a few uneven ones, `error` for all else."""
    data_seed: int = pydantic.Field(0, ge=0)

    @pydantic.field_validator("train", "test", "demonstrations", "second", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


WORLD_ROWS = {"train_rows": 3072, "test_rows": 512, "demonstration_rows": 3072}


class Data(Stage, DataSettings):
    """Writes `train.parquet`, `test.parquet` (preferences), `demonstrations.parquet` and `bad_rows.jsonl`."""

    base: Stage
    """Its tokenizer measures the prompts."""
    content: str = ""
    """Digest of what the files hold; found out here. It is the identity of the rows, their paths are not."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read_content(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("content"):
            return values
        settings = DataSettings(**{name: values[name] for name in DataSettings.model_fields if name in values})
        if settings.format == "world":
            if given := [name for name in ("train", "test", "demonstrations", "second") if getattr(settings, name)]:
                raise InputError(
                    f"data.{given[0]}: found {getattr(settings, given[0])[0]!r} beside format 'world', whose rows are "
                    "generated; expected data.format=preference, hh-rlhf or tldr with files"
                )
            filled = {name: values.get(name) or default for name, default in WORLD_ROWS.items()}
            return {**values, **filled, "content": f"world-{WORLD_VERSION}"}
        if not settings.train:
            raise InputError(f"data.train: found nothing; format {settings.format!r} expects a file or hub:NAME")
        groups = [settings.train, settings.test, settings.demonstrations]
        groups += [settings.second] if settings.second and settings.second_rows else []
        digests = [
            [name if name.startswith("hub:") else content_digest([Path(name).expanduser()]) for name in group]
            for group in groups
        ]
        return {**values, "content": " | ".join(" ".join(group) for group in digests)}

    @pydantic.model_validator(mode="after")
    def _agree_with_base(self) -> Self:
        if (of_base := getattr(self.base, "special_tokens", self.special_tokens)) != self.special_tokens:
            raise InputError(
                f"data.special_tokens: found {self.special_tokens!r}, and {of_base!r} in the model that the rows are "
                "for, which keeps it for every stage; expected the same in Pretrained and Data"
            )
        return self

    def _exclude_from_cls_uid(self) -> list[str]:
        return ["train", "test", "demonstrations", "second"]

    @property
    def train_pairs(self) -> Part:
        """The human pairs as given."""
        return Part(stage=self, of="train")

    @property
    def second_pairs(self) -> Part:
        """The human pairs kept apart for a second reward model."""
        return Part(stage=self, of="second")

    def work(self, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        """Read, validate, cut to size, write."""
        cost = Cost()
        tokenizer = load_tokenizer(model_in(inputs["base"]))
        warnings = check_tokenizer(tokenizer)

        kinds: list[type] = []

        def fits(prompt: Prompt) -> None:
            kinds.append(type(prompt))
            if kinds[-1] is not kinds[0]:
                raise RowError("prompt", f"is {kind_of(prompt)}, the first row's is not; expected one kind; {FIX}")
            length = len(prompt_tokens(tokenizer, prompt))
            if length > self.max_prompt_tokens:
                raise RowError(
                    "prompt",
                    f"has {length} tokens; expected at most {self.max_prompt_tokens}; drop the row or raise "
                    "data.max_prompt_tokens",
                )

        train, test, second, demonstrations, bad, total = self._read(fits)
        policy = self.on_bad_row or ("drop" if self.format == "hh-rlhf" else "error")
        if bad:
            (out / "bad_rows.jsonl").unlink(missing_ok=True)
            append_jsonl(out / "bad_rows.jsonl", [asdict(row) for row in bad])
            if policy == "error":
                refuse(bad, total)
        if not test:
            train, test = _hold_out(train, self.test_share, self.data_seed)
        if self.second_rows and not self.second:
            found = len(train)
            train, second = _hold_out(train, self.second_rows / max(1, found), self.data_seed + 1)
            if second and not train:
                raise InputError(
                    f"data.second_rows: found {self.second_rows} of {found} train rows, which leaves none to train on; "
                    "expected fewer, or files of their own in data.second"
                )
        train, test = _draw(train, self.train_rows, self.data_seed), _draw(test, self.test_rows, self.data_seed)
        if not demonstrations:
            demonstrations = [Demonstration(row.prompt, row.chosen) for row in train]
        demonstrations = _draw(demonstrations, self.demonstration_rows, self.data_seed)
        kept: dict[str, list[Preference] | list[Demonstration]] = {
            "train": train,
            "test": test,
            "demonstrations": demonstrations,
        }
        if self.second_rows:
            seen = {json.dumps(row.prompt) for row in train + test}
            second = [row for row in second if json.dumps(row.prompt) not in seen]
            kept["second"] = second = _draw(second, self.second_rows, self.data_seed)
        for name, rows in kept.items():
            if not rows:
                raise InputError(
                    f"data.{name}: nothing is left of {total} rows after {len(bad)} bad ones were dropped; "
                    f"see {out / 'bad_rows.jsonl'} for why"
                    if bad
                    else f"data.{name}: found no rows; expected at least one"
                )
            asked = getattr(self, f"{name.removesuffix('s')}_rows")
            if asked is not None and len(rows) < asked:
                watcher.get().note(f"data.{name}: {len(rows)} rows, where {asked} were asked for: there are no more")
            write_rows(out / f"{name}.parquet", rows)
        for name in (*self.train, *self.test, *self.demonstrations, *self.second):
            if name.startswith("hub:") and self.revision is None:
                watcher.get().note(f"{name} is read as it is today; data.revision=COMMIT keeps to one state of it")
        prompts = [row.prompt for rows in kept.values() for row in rows]
        for line in (*warnings, *check_prompts(tokenizer, prompts)):
            watcher.get().note(line)
        if bad:
            watcher.get().note(f"{len(bad)} of {total} rows dropped, listed in {out / 'bad_rows.jsonl'}")
        finish(
            out,
            cost,
            format=self.format,
            train_rows=len(train),
            test_rows=len(test),
            demonstration_rows=len(demonstrations),
            second_rows=len(second),
            bad_rows=len(bad),
        )

    def _read(
        self, check: Check
    ) -> tuple[list[Preference], list[Preference], list[Preference], list[Demonstration], list[BadRow], int]:
        if self.format == "world":
            world = make_world(
                demonstrations=self.demonstration_rows or 0,
                train=(self.train_rows or 0) + self.second_rows,
                test=self.test_rows or 0,
                seed=self.data_seed,
            )
            return (
                [Preference(_asked(prompt), chosen, rejected) for prompt, chosen, rejected in world.train],
                [Preference(_asked(prompt), chosen, rejected) for prompt, chosen, rejected in world.test],
                [],
                [Demonstration(_asked(prompt), completion) for prompt, completion in world.demonstrations],
                [],
                len(world.train) + len(world.test) + len(world.demonstrations),
            )
        bad: list[BadRow] = []
        rows: list[list[Preference]] = [[], [], []]
        second = self.second if self.second_rows else ()
        for target, names, split in zip(rows, (self.train, self.test, second), ("train", "test", "train"), strict=True):
            for name in names:
                found, problems = self._preferences(name, split, check)
                target += found
                bad += problems
        demonstrations: list[Demonstration] = []
        for name in self.demonstrations:
            shown, problems = self._demonstrations(name, check)
            demonstrations += shown
            bad += problems
        train, test, held = rows
        return train, test, held, demonstrations, bad, sum(map(len, rows)) + len(demonstrations) + len(bad)

    def _preferences(self, name: str, split: str, check: Check) -> tuple[list[Preference], list[BadRow]]:
        assert self.format != "world"
        if not name.startswith("hub:"):
            return read_preferences(Path(name).expanduser(), self.format, check)
        dataset, where = self._hub(name)
        return read_hub_preferences(dataset, self.format, check, split=split, **where)

    def _demonstrations(self, name: str, check: Check) -> tuple[list[Demonstration], list[BadRow]]:
        if not name.startswith("hub:"):
            return read_demonstrations(Path(name).expanduser(), check)
        dataset, where = self._hub(name)
        return read_hub_demonstrations(dataset, check, split="train", **where)

    def _hub(self, name: str) -> tuple[str, dict[str, str | None]]:
        """Data set, folder and revision of `hub:OWNER/NAME[/DATA_DIR]`."""
        owner, _, rest = name.removeprefix("hub:").partition("/")
        dataset, _, data_dir = rest.partition("/")
        return f"{owner}/{dataset}", {"data_dir": data_dir or None, "revision": self.revision}


def _asked(prompt: str) -> Prompt:
    return [{"role": "user", "content": prompt}]


def _hold_out(rows: Sequence[Preference], share: float, seed: int) -> tuple[list[Preference], list[Preference]]:
    """Train and test rows that have no prompt in common."""
    prompts = sorted({json.dumps(row.prompt) for row in rows})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: max(1, round(share * len(prompts)))])
    train = [row for row in rows if json.dumps(row.prompt) not in held]
    return train, [row for row in rows if json.dumps(row.prompt) in held]


def _draw(rows: list[Any], count: int | None, seed: int) -> list[Any]:
    """`count` of the rows in their order; all of them if there are no more."""
    if count is None or count >= len(rows):
        return rows
    return [rows[place] for place in sorted(random.Random(seed).sample(range(len(rows)), count))]
