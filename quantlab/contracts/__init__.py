"""Everything that crosses a hook: frozen dataclasses and abstract classes, no logic."""
