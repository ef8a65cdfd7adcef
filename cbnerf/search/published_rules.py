"""Two published pruning rules that the race is compared with (`stopping.rule`).

`values[c, s, r]` is the quality of configuration `c` on scene `s` at rung `r`, NaN where it has not
been measured; larger is better.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

Array = NDArray[np.floating]


def halving_keeps(values: Array, challenger: int, eta: int) -> bool:
    """Asynchronous successive halving (ASHA), stopping variant: whether a configuration is among
    the best 1 / `eta` of those that have completed its highest completed rung.

    A rung is complete once all scenes are measured; their mean counts. The rule is applied again
    after each new value, as others may have overtaken the configuration. Ray's `ASHAScheduler`
    decides once for a trial (here: one scene) at each rung, and keeps it if it reaches the
    (1 - 1 / `eta`) quantile of the trials recorded there before.
    """
    means = values.mean(axis=1)  # NaN unless all scenes are measured
    rungs = np.flatnonzero(~np.isnan(means[challenger]))
    if not len(rungs):
        return True
    peers = means[~np.isnan(means[:, rungs[-1]]), rungs[-1]]
    keep = max(len(peers) // eta, 1)
    return bool(means[challenger, rungs[-1]] >= np.sort(peers)[-keep])


def signed_ranks_keep(values: Array, challenger: int, rival: int, threshold: float) -> bool:
    """Wilcoxon's signed-rank test of the scenes of the last rung, by the rule of Optuna's
    `WilcoxonPruner`: at least two scenes; scenes without a difference count half for either; a
    configuration whose mean is no worse than the rival's mean over all scenes is kept, and so is
    every configuration if a value of either is infinite."""
    reached, best = values[challenger, :, -1], values[rival, :, -1]
    seen = ~np.isnan(reached)
    is_finite = np.isfinite(reached[seen]).all() and np.isfinite(best).all()
    if seen.sum() < 2 or not is_finite or reached[seen].mean() >= best.mean():
        return True
    differences = reached[seen] - best[seen]
    p_value = np.asarray(wilcoxon(differences, alternative="less", zero_method="zsplit"))[1]
    return bool(p_value >= threshold)
