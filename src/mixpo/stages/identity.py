"""Identity of a stage, from which its folder is named. The only module that imports exca."""

import json
from typing import Any

import exca.helpers
from exca import ConfDict


class IdentifiedModel(exca.helpers.DiscriminatedModel):
    """A pydantic model with an identity: its fields, nested ones included, except those that have their default."""

    def fields_outside_identity(self) -> list[str]:
        """Return the names of fields that do not change results, such as a path whose content is another field."""
        return []

    def _exclude_from_cls_uid(self) -> list[str]:
        """Return `fields_outside_identity`; exca calls it by this name."""
        return self.fields_outside_identity()


def make_folder_name(stage: IdentifiedModel) -> str:
    """Make the folder name of a stage; its last eight hex digits are a digest of the identity."""
    return str(ConfDict.from_model(stage, uid=True, exclude_defaults=True).to_uid())


def list_identity_settings(stage: IdentifiedModel) -> dict[str, Any]:
    """Return the settings of a stage's identity as JSON values, defaults and upstream stages included."""
    content: dict[str, Any] = json.loads(json.dumps(ConfDict.from_model(stage, uid=True, exclude_defaults=False)))
    return content
