"""What people look at: terminal tables, figures, pages, the dashboard. It may import all but `demo` and `cli`."""

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

if TYPE_CHECKING:
    from moeopt.report import dashboard, figures, optimiser_comparison, terminal

__all__ = ["dashboard", "figures", "optimiser_comparison", "terminal"]

__getattr__ = lazily(__name__, {}, __all__)
