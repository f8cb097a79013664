"""Identity of a stage, from which its folder is named. The only module that imports exca."""

import json
from typing import Any

import exca.helpers
from exca import ConfDict


class IdentifiedModel(exca.helpers.DiscriminatedModel):
    """A pydantic model with an identity: its fields, nested ones included, except those that have their default."""

    def list_fields_outside_identity(self) -> list[str]:
        """Names of fields that do not change results, such as a path whose content is another field."""
        return []

    def _exclude_from_cls_uid(self) -> list[str]:
        """The hook by which exca asks for `list_fields_outside_identity`."""
        return self.list_fields_outside_identity()


def make_stage_folder_name(stage: IdentifiedModel) -> str:
    """Folder name of a stage; its last eight hex digits are a digest of the stage's identity."""
    return str(ConfDict.from_model(stage, uid=True, exclude_defaults=True).to_uid())


def collect_identity_settings(stage: IdentifiedModel) -> dict[str, Any]:
    """The settings of a stage's identity as nested JSON values, defaults and input stages included."""
    content: dict[str, Any] = json.loads(json.dumps(ConfDict.from_model(stage, uid=True, exclude_defaults=False)))
    return content
