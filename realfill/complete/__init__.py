"""From adapter to candidates: samplers, compositing and the reference road."""
