"""MiCE, unsupervised image clustering by a mixture of contrastive experts: the names most users need.

Each name is imported from its module when it is first used, so that `import mice` is light. All modules are
generated from the notebooks in `nbs/`; only the `__init__.py` files and `__main__.py` are written by hand.
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .clustering.estimator import MiCE
    from .config import Config
    from .data.datasets import load_dataset
    from .data.images import digits
    from .elbo import mice_objective
    from .metrics import evaluate
    from .training.loop import MiCEModel, fit, predict
    from .training.official import load_official
    from .training.tensorboard import TensorBoard

_HOME = dict(
    MiCE="clustering.estimator",
    Config="config",
    fit="training.loop",
    predict="training.loop",
    MiCEModel="training.loop",
    mice_objective="elbo",
    load_dataset="data.datasets",
    digits="data.images",
    evaluate="metrics",
    load_official="training.official",
    TensorBoard="training.tensorboard",
)  # name -> module

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'mice' has no attribute {name!r}; it has {', '.join(_HOME)}, and its modules")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
