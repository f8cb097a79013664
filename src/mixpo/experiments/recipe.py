"""Recipes: a YAML file that fixes model, data, hyper-parameters, arms and sweeps, with dotted overrides."""

import copy
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, get_args

import pydantic
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mixpo.data.errors import InputError
from mixpo.data.rows import describe_type
from mixpo.experiments.cluster import InfraSettings
from mixpo.models.adapters import LoraSettings
from mixpo.models.network import Precision
from mixpo.models.samplers import SamplerName
from mixpo.settings import Settings, format_found_and_expected
from mixpo.stages.data import DataSettings, split_hub_name
from mixpo.stages.dpo import DPOSettings
from mixpo.stages.evaluation import EvaluationSettings
from mixpo.stages.gradients import GradientsSettings
from mixpo.stages.label_noise import LabelNoiseSettings
from mixpo.stages.ppo_settings import PPOSettings
from mixpo.stages.pretrained import PretrainedSettings
from mixpo.stages.reward_model import RewardModelSettings
from mixpo.stages.samples import SamplesSettings
from mixpo.stages.selection import SelectionSettings
from mixpo.stages.sft import SFTSettings
from mixpo.training.runtime import Runtime

DEFAULT_RECIPE = "world"
SHARED_KEYS = ("precision", "max_completion_tokens", "lora", "sampler")
"""Keys that a recipe may set once for all its sections."""
UNION_MEMBERS = ("bool", "int", "float", "str")
"""Parts that pydantic appends to the key of a value that may have several types."""
UNSWEPT_SECTIONS = ("trace", "gradients", "runtime", "infra")
"""Sections without effect on an arm, which a sweep cannot change."""
MANDATORY = "???"
"""Placeholder of a value that an override must set."""
MAX_RECIPE_BYTES = 2**20
"""Largest size of a recipe file, in bytes."""


class Sweep(Settings):
    """A sweep: arms repeated at every combination of the listed values of some settings.

    Written as `{arms: [ppo, mpo], ppo.kl_coef: [0.05, 0.2]}`; all arms of the recipe if none are named.
    """

    arms: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] | None = None
    values: dict[str, Annotated[tuple[Any, ...], pydantic.Field(min_length=1)]] = pydantic.Field(min_length=1)
    """By dotted key."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _collect_values(cls, sweep: Any) -> Any:
        """Move all keys but `arms` under `values`, by dotted key, before validation."""
        if not isinstance(sweep, Mapping) or "values" in sweep:
            return sweep
        keys = {key: value for key, value in sweep.items() if key != "arms"}
        return {"arms": sweep.get("arms"), "values": dict(_flatten_sections(keys))}

    def list_setting_combinations(self) -> list[dict[str, Any]]:
        """List every combination of the swept values, each as a dictionary of values by dotted key."""
        return [dict(zip(self.values, point, strict=True)) for point in itertools.product(*self.values.values())]


def _flatten_sections(sections: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every leaf of nested sections."""
    for key, value in sections.items():
        if isinstance(value, Mapping):
            yield from _flatten_sections(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class TraceSettings(Settings):
    """Settings of traces: which arms are also evaluated at snapshots along their PPO, and at how many."""

    arms: tuple[str, ...] = ()
    snapshots: int = pydantic.Field(4, ge=1)
    """Number of snapshots; start and end of training are evaluated too."""


class Recipe(Settings):
    """All settings of an experiment: model, data, stages, arms, seeds and sweeps."""

    name: str
    arms: tuple[str, ...] = pydantic.Field(min_length=1)
    seeds: tuple[Annotated[int, pydantic.Field(ge=0)], ...] = pydantic.Field((0,), min_length=1)
    """Seeds of which every arm is run once each; a section's own `seed` overrides them."""
    sweep: tuple[Sweep, ...] = ()
    """One sweep or a list of them."""
    trace: TraceSettings = TraceSettings()
    best_of: int = pydantic.Field(16, ge=2)
    """Completions that the arm best-of-n chooses from."""
    group_size: int = pydantic.Field(4, ge=2)
    """Completions a prompt that mpo-rloo and mpo-grpo compare."""
    out: Path | None = None
    """The run's folder; runs/NAME if not given."""
    cache: Path = Path("runs/cache")
    """Where stages are kept, for all runs."""
    precision: Precision = "float32"
    max_completion_tokens: int = pydantic.Field(512, ge=1)
    lora: LoraSettings | None = None
    sampler: SamplerName = "local"
    model: PretrainedSettings = PretrainedSettings()
    data: DataSettings = DataSettings()
    label_noise: LabelNoiseSettings = LabelNoiseSettings()
    sft: SFTSettings = SFTSettings()
    reward: RewardModelSettings = RewardModelSettings()
    samples: SamplesSettings = SamplesSettings()
    selection: SelectionSettings
    dpo: DPOSettings = DPOSettings()
    ppo: PPOSettings = PPOSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gradients: GradientsSettings = GradientsSettings()
    runtime: Runtime = Runtime()
    infra: InfraSettings = InfraSettings()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _normalize_sections(cls, values: Any) -> Any:
        """Validator: copy shared keys to every section that has them and does not set its own; make sweeps a list."""
        shared = {key: values[key] for key in SHARED_KEYS if key in values}
        values = dict(values)
        for name, section in _get_section_types().items():
            section_values = values.get(name, {})
            if isinstance(section_values, Mapping):
                values[name] = {**{key: shared[key] for key in shared if key in section.model_fields}, **section_values}
        if isinstance(values.get("sweep"), Mapping):
            values["sweep"] = [values["sweep"]]
        elif values.get("sweep") is None:
            values.pop("sweep", None)
        return values

    @pydantic.field_validator("name")
    @classmethod
    def _require_folder_name(cls, name: str) -> str:
        """Raise ValueError unless the run's name can be the name of a folder."""
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ValueError("a folder's name: letters, digits, -, _, and . but not at its beginning")
        return name

    @pydantic.field_validator("model")
    @classmethod
    def _require_model_path_or_id(cls, model: PretrainedSettings) -> PretrainedSettings:
        """Raise `InputError` unless the model's path exists here or could be a Hugging Face id."""
        if model.init_seed < 0:
            raise InputError(f"model.init_seed: found {model.init_seed}; expected greater than or equal to 0")
        path = model.path
        if path.endswith(".gguf") or path.startswith("package:") or os.path.exists(os.path.expanduser(path)):
            return model
        if not _is_hub_id(path):
            raise InputError(
                f"model.path: found {path!r}, which does not exist here and is not a valid Hugging Face id; expected "
                "a model folder, a .gguf file, package:NAME/FILE.gguf, or an id such as gpt2 or OWNER/NAME"
            )
        return model

    @pydantic.field_validator("data")
    @classmethod
    def _require_hub_ids(cls, data: DataSettings) -> DataSettings:
        """Raise `InputError` on a data source hub:NAME that is not a valid Hugging Face id."""
        for key in ("train", "test", "demonstrations", "second"):
            for name in getattr(data, key):
                if name.startswith("hub:") and not _is_hub_id(split_hub_name(name)[0]):
                    raise InputError(f"data.{key}: found {name!r}; expected hub:OWNER/NAME or hub:OWNER/NAME/DATA_DIR")
        return data

    @pydantic.field_validator("arms", "seeds")
    @classmethod
    def _reject_duplicates(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Raise ValueError on an arm or a seed that is listed twice."""
        duplicates = [value for index, value in enumerate(values) if value in values[:index]]
        if duplicates:
            raise ValueError(f"each only once; {duplicates[0]!r} is repeated")
        return values

    @property
    def run_folder(self) -> Path:
        """The run's folder: `out`, or if not given runs/NAME."""
        return self.out or Path("runs") / self.name

    def dump_settings(self) -> dict[str, Any]:
        """Return all settings as keys and values that read as the same recipe; a section's seed only if it was set."""
        unset = {name: {"seed"} for name in _get_section_types() if "seed" not in getattr(self, name).model_fields_set}
        return self.model_dump(mode="json", exclude=unset)

    def with_changes(self, changes: Mapping[str, Any]) -> "Recipe":
        """Return a copy with changes by dotted key. Raises `InputError` on a key that a sweep cannot change."""
        values = self.model_dump(mode="json", exclude_unset=True)
        swept = {name: section for name, section in _get_section_types().items() if name not in UNSWEPT_SECTIONS}
        for key, value in changes.items():
            *path, last = key.split(".")
            if not path or path[0] not in swept:
                known = [f"{name}.{key}" for name, section in swept.items() for key in section.model_fields]
                raise InputError(
                    f"sweep: found key {key!r}; expected a key of a section that arms are made of, such as ppo.kl_coef"
                    f"{suggest_nearest(key, known)}"
                )
            section = values
            for part in path:
                below = section.get(part)
                section[part] = section = below if isinstance(below, dict) else {}
            section[last] = copy.deepcopy(value)
        with explain_validation_errors("sweep: "):
            return Recipe(**values)


def _is_hub_id(text: str) -> bool:
    """Return True if a text could be a Hugging Face id; no server is asked."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _get_section_types() -> dict[str, type[Settings]]:
    """Return the settings class of every section of a recipe, by the section's name."""
    return {
        name: field.annotation
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
    }


def read_recipe(name_or_file: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by file or by the name of one that comes with mixpo, apply `key=value` overrides, validate it.

    Raises `InputError` with a line for every problem.
    """
    source = DEFAULT_RECIPE if name_or_file is None else name_or_file
    values = _read_values_over_bases(source)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise InputError(f"{override!r}: found no key=value; expected one such as ppo.kl_coef=0.2 after the recipe")
        value = _parse_yaml(key, text)
        for part in reversed(key.split(".")):
            value = {part: value}
        values = _merge_sections(values, value)
    if missing := [key for key, value in _flatten_sections(values) if value == MANDATORY]:
        raise InputError(
            "\n".join(f"{source}: {key}: not given; expected for example {key}=PATH" for key in sorted(missing))
        )
    with explain_validation_errors(f"{source}: "):
        return Recipe(**values)


def _read_values_over_bases(name: str, derived: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read the unvalidated values of a recipe, merged over those of the recipe that it names as its `base`."""
    source, text = _load_recipe_text(name)
    values = _parse_yaml(source, text) or {}
    if not isinstance(values, dict):
        raise InputError(f"{source}: found {describe_type(values)}; expected a recipe: keys and values")
    base = values.pop("base", None)
    if base is None:
        return values
    if base in (name, *derived):
        raise InputError(f"{source}: found a cycle of bases {' → '.join((*derived, name, base))}; remove one `base`")
    return _merge_sections(_read_values_over_bases(str(base), (*derived, name)), values)


class _RecipeLoader(yaml.SafeLoader):
    """YAML loader of recipes: refuses aliases, interpolations and duplicate keys; keys are text, 1e-3 is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [one for one in resolvers if one[0] != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="an alias; write the value again", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        if re.search("[\0\ud800-\udfff]", node.value):
            raise yaml.MarkedYAMLError(problem="NUL or half a surrogate pair", problem_mark=node.start_mark)
        if re.search(r"\$\{\w", node.value):
            problem = "an interpolation ${...}; recipes read nothing from elsewhere: write the value"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_scalar(node)

    def construct_yaml_int(self, node: Any) -> int:
        number: int = super().construct_yaml_int(node)
        if abs(number) >= 2**63:
            raise yaml.MarkedYAMLError(problem="a whole number beyond 64 bits", problem_mark=node.start_mark)
        return number

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is not text", problem_mark=key.start_mark)
            key.tag = "tag:yaml.org,2002:str"
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.MarkedYAMLError(problem="a duplicate key", problem_mark=node.start_mark)
        return mapping


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_RecipeLoader.add_constructor("tag:yaml.org,2002:int", _RecipeLoader.construct_yaml_int)


def _parse_yaml(source_name: str, yaml_text: str) -> Any:
    """Parse a YAML text into plain Python values. Raises `InputError` that names the source on invalid YAML."""
    try:
        return yaml.load(yaml_text, _RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}" if mark else ""
        raise InputError(f"{source_name}: found no readable YAML ({error.problem}{where})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise InputError(f"{source_name}: found no readable YAML ({reason})") from error


def _merge_sections(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a base with overrides merged in, section by section; `???` unsets the value of the base."""
    merged = {
        key: _merge_sections(base[key], value)
        for key, value in overrides.items()
        if isinstance(base.get(key), Mapping) and isinstance(value, Mapping)
    }
    return {**base, **overrides, **merged}


def _load_recipe_text(name: str) -> tuple[str, str]:
    """Return the name and the YAML text of a recipe file or of a recipe that comes with mixpo."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or os.path.isfile(name):
        try:
            if not path.is_file():
                near = get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], n=1)
                hint = f"; did you mean {path.parent / near[0]}?" if near and not path.exists() else ""
                kind = "something other than a file" if path.exists() else "no such file"
                raise InputError(f"{name}: found {kind}; expected a recipe: a .yaml file of keys and values{hint}")
            with path.open("rb") as file:
                content = file.read(MAX_RECIPE_BYTES + 1)
            if len(content) > MAX_RECIPE_BYTES:
                raise InputError(
                    f"{name}: found more than {MAX_RECIPE_BYTES:,} bytes; expected a recipe: keys and values"
                )
            return name, content.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{name}: found no readable recipe file ({type(error).__name__})") from error
    shipped = {Path(file.name).stem: file for file in files("mixpo.recipes").iterdir() if file.name.endswith(".yaml")}
    if name not in shipped:
        raise InputError(
            f"{name or repr(name)}: found neither a recipe file nor a recipe of that name; expected a .yaml file or "
            f"one of those that come with mixpo, then KEY=VALUE without spaces{suggest_nearest(name, shipped)}"
        )
    return name, shipped[name].read_text(encoding="utf8")


@contextmanager
def explain_validation_errors(line_prefix: str = "") -> Iterator[None]:
    """Context manager that converts pydantic's errors to one `InputError`, a line a wrong key: found and expected."""
    try:
        yield
    except pydantic.ValidationError as error:
        raise InputError("\n".join(line_prefix + line for line in _list_validation_problems(error))) from error


def _list_validation_problems(error: pydantic.ValidationError) -> list[str]:
    """List pydantic's errors as lines such as `KEY: found X; expected Y`, without those that follow from others."""
    problems = error.errors()
    locations = {problem["loc"] for problem in problems}
    lines: list[str] = []
    for problem in problems:
        location = problem["loc"]
        if location[1:2] and location[1] in SHARED_KEYS and location[1:] in locations:
            continue  # handed down from there
        if problem["type"] == "too_short" and any(location == other[: len(location)] != other for other in locations):
            continue  # only because one of its values is wrong
        key = ".".join(str(part) for part in location if part not in ("values", *UNION_MEMBERS))
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, InputError):
            lines.append(str(cause))
        elif problem["type"] == "extra_forbidden":
            known = _list_sibling_keys(location)
            lines.append(f"{key}: unknown key{suggest_nearest(str(location[-1]), known)}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: not given; expected a value")
        else:
            found, expected = format_found_and_expected(problem)
            line = f"{key}: found {found}; expected "
            if not lines or not lines[-1].startswith(line):
                lines.append(line + expected)
            elif not lines[-1].endswith(expected):  # a value of another kind would do too
                lines[-1] += f" or {expected}"
    return lines


def _list_sibling_keys(location: tuple[int | str, ...]) -> list[str]:
    """List the known keys of the recipe's section that holds the key at the location of a pydantic error."""
    fields: Mapping[str, Any] = Recipe.model_fields
    for part in location[:-1]:
        annotation = fields[str(part)].annotation if str(part) in fields else None
        models = [kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")]
        fields = models[0].model_fields if models else {}
    return list(fields)


def suggest_nearest(unknown: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """Return the end of a message on an unknown name: `; did you mean NEAREST?`, or `; known are` all known names."""
    near = get_close_matches(unknown, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}" if known else ""
