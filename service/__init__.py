"""The HTTP service: scenes in the registry, one engine per device, answers with evidence."""
