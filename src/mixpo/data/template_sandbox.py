"""Subprocess that renders a chat template under time and memory limits; `templates.py` runs it as a program.

A template is untrusted code, and one operation such as `9**9**9` may run forever where Python can neither interrupt
nor trace it, so the limits are those of a process. The Jinja environment copies the parts of transformers' one that
affect control flow. Other errors are ignored here: they recur, and are reported, when transformers renders.
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

MEMORY_LIMIT = 2**30
OUT_OF_MEMORY = 3
"""Exit code of a rendering that exceeds the memory limit."""


class GenerationTag(Extension):
    """Jinja extension for the `{% generation %}` tag of transformers; renders the block as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """Parse the block up to `endgeneration` and return its nodes."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_template_error(message: str) -> None:
    """Raise `TemplateError`; templates call it as `raise_exception`."""
    raise TemplateError(message)


def convert_to_json(value: Any, **settings: Any) -> str:
    """Serialize to JSON like the `tojson` filter of transformers, without HTML escapes."""
    return json.dumps(value, **{"ensure_ascii": False, **settings})


def main() -> None:
    """Render the dialogues of the job on standard input under time and memory limits; the exit code is the outcome."""
    job = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"]))
    with suppress(ValueError):  # not on macOS
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = convert_to_json
    environment.globals |= {"raise_exception": raise_template_error, "strftime_now": time.strftime}
    for dialogue in job["dialogues"]:
        try:
            environment.from_string(job["template"]).render(**job["variables"], **dialogue)
        except MemoryError:
            sys.exit(OUT_OF_MEMORY)
        except Exception:  # transformers reports it
            continue


if __name__ == "__main__":
    main()
