"""optuna-dashboard with each study's note and figures, kept current while studies run.

    study.optimize(objective, n_trials=400, callbacks=[moeopt.report.dashboard.Refresh()])

writes them for whoever runs `optuna-dashboard`; `moeopt dashboard STORAGE` serves and refreshes all studies of a
storage. It reads studies (`study`, `spaces`) and draws with `report.figures`.
"""

from moeopt.report.dashboard.refreshing import Refresh, Refresher, attach
from moeopt.report.dashboard.serving import refresh_in_background, server

__all__ = ["Refresh", "Refresher", "attach", "refresh_in_background", "server"]
