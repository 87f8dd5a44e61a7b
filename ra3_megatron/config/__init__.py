"""Typed run configuration: one class per concern, YAML plus dotted overrides, validated before anything starts."""
