"""Watch a training run: see `watch` and `Watcher`."""

from diag.callable_package import make_callable
from diag.watch.watcher import Watcher, watch

__all__ = ["Watcher", "watch"]

make_callable(__name__, watch)
