"""What every configuration section shares: strict types, no unknown keys, a docstring under each field."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One concern of a run. Immutable; the docstring literal under a field is its documentation."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )
