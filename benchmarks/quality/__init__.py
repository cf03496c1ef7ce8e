"""How good fills are: the base against classical fills, adapters against the base."""
