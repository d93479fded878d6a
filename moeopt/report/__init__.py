"""What people look at: terminal tables, figures, the dashboard."""

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

if TYPE_CHECKING:
    from moeopt.report import dashboard, figures, optimiser_comparison, terminal

__all__ = ["dashboard", "figures", "optimiser_comparison", "terminal"]

__getattr__ = lazily(__name__, {}, __all__)
