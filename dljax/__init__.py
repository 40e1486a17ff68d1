"""Reference implementations of deep-learning architecture families in JAX and Flax."""


def __getattr__(name: str) -> object:
  """Imports `dljax.load` when it is first used, so that `import dljax` alone imports nothing."""
  if name == "load":
    from dljax.runs import load

    return load
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
