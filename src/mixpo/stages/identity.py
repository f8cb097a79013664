"""The identity of a stage: what names its folder. The only module that knows exca."""

import json
from typing import Any

import exca.helpers
from exca import ConfDict


class Identified(exca.helpers.DiscriminatedModel):
    """A model of settings with an identity: its fields and those of the models that it holds, but for defaults."""

    def fields_outside_identity(self) -> list[str]:
        """Return the names of fields that do not change what is computed, such as a path whose content is a field."""
        return []

    def _exclude_from_cls_uid(self) -> list[str]:
        return self.fields_outside_identity()


def name_folder(stage: Identified) -> str:
    """Name the folder of a stage; the last eight hex digits are a digest of its identity."""
    return str(ConfDict.from_model(stage, uid=True, exclude_defaults=True).to_uid())


def identity_settings(stage: Identified) -> dict[str, Any]:
    """All settings that belong to a stage's identity, defaults and upstream stages too, as JSON has them."""
    content: dict[str, Any] = json.loads(json.dumps(ConfDict.from_model(stage, uid=True, exclude_defaults=False)))
    return content
