"""Renders a chat template in a process of its own, which can be ended: a program that `templates.py` runs.

A template is a program from elsewhere, and one operation of it, such as `9**9**9`, may run for ever where Python can
neither interrupt nor trace it. So its time and memory are limits of a process. The environment is that of transformers
as far as it decides where a template goes; what else fails here fails again, and is told, where transformers renders.
"""

import json
import resource
import sys
import time
from contextlib import suppress
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30
OUT_OF_MEMORY = 3
"""Exit code."""


class Generation(Extension):
    """`{% generation %}` of transformers, which marks what a model says, without the mark."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """The nodes within."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> None:
    """`raise_exception` of templates."""
    raise TemplateError(message)


def to_json(value: Any, **settings: Any) -> str:
    """`tojson` of transformers, which escapes no HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **settings})


def main() -> None:
    """Render the template of the job on standard input over each of its dialogues."""
    job = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"]))
    with suppress(ValueError):  # not on macOS
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    for dialogue in job["dialogues"]:
        try:
            environment.from_string(job["template"]).render(**job["variables"], **dialogue)
        except MemoryError:
            sys.exit(OUT_OF_MEMORY)
        except Exception:  # told where transformers renders
            continue


if __name__ == "__main__":
    main()
