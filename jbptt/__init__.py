"""How far back does the gradient of a recurrent model reach, and what does truncation cost?"""

from typing import TYPE_CHECKING, Any

from jbptt import lazy

if TYPE_CHECKING:
    from jbptt import analysis, cells, clipping, experiments, interop, testing, truncation
    from jbptt.adaptive import adaptive_bptt
    from jbptt.analysis.comparison import Comparison, compare
    from jbptt.analysis.costs import Cost, measure_cost
    from jbptt.analysis.flow import Adjoints, adjoints, gradient_flow
    from jbptt.analysis.jacobian_spans import JacobianProducts, jacobian_products
    from jbptt.analysis.jacobians import step_jacobians
    from jbptt.analysis.lags import LagProfile, TruncationCurve, lag_profile, truncation_curve
    from jbptt.analysis.linalg import powers
    from jbptt.analysis.lyapunov import LyapunovSpectrum, lyapunov_spectrum
    from jbptt.analysis.nonfinite import NonFinite, find_nonfinite
    from jbptt.analysis.plan_search import choose_plan
    from jbptt.diagnosis.question import diagnose
    from jbptt.diagnosis.result import Diagnosis
    from jbptt.estimators import full_bptt, gated_bptt, randomized_bptt, truncated_bptt
    from jbptt.experiments import tasks
    from jbptt.experiments.training import History, train
    from jbptt.experiments.training_chunks import TrainingChunk, train_in_chunks
    from jbptt.learning.studies import learning_study
    from jbptt.learning.study_result import LearningStudy
    from jbptt.online.rank_one import uoro
    from jbptt.online.sparse import rflo, rtrl, snap
    from jbptt.online.structure import InfluenceStructure, influence_structure
    from jbptt.plans import Plan
    from jbptt.recurrence import unroll
    from jbptt.report import plots
    from jbptt.scanning import scan
    from jbptt.sweeps.points import grid
    from jbptt.sweeps.sweeping import SweepStopped, load_sweep, sweep
    from jbptt.types import Batch, Carry, Estimate, Estimator, Loss, Params, Step

    __version__: str

# What type checkers read above says the same as this, which a test holds.
_get, __dir__, __all__ = lazy.attach(
    __name__,
    homes={
        "adaptive": "adaptive_bptt",
        "analysis.comparison": "Comparison compare",
        "analysis.costs": "Cost measure_cost",
        "analysis.flow": "Adjoints adjoints gradient_flow",
        "analysis.jacobian_spans": "JacobianProducts jacobian_products",
        "analysis.jacobians": "step_jacobians",
        "analysis.lags": "LagProfile TruncationCurve lag_profile truncation_curve",
        "analysis.lyapunov": "LyapunovSpectrum lyapunov_spectrum",
        "analysis.nonfinite": "NonFinite find_nonfinite",
        "analysis.plan_search": "choose_plan",
        "diagnosis.question": "diagnose",
        "diagnosis.result": "Diagnosis",
        "estimators": "full_bptt gated_bptt randomized_bptt truncated_bptt",
        "experiments.training_chunks": "TrainingChunk train_in_chunks",
        "experiments.training": "History train",
        "learning.studies": "learning_study",
        "learning.study_result": "LearningStudy",
        "online.rank_one": "uoro",
        "online.sparse": "rflo rtrl snap",
        "online.structure": "InfluenceStructure influence_structure",
        "plans": "Plan",
        "recurrence": "unroll",
        "scanning": "scan",
        "sweeps.points": "grid",
        "sweeps.sweeping": "SweepStopped load_sweep sweep",
        "types": "Batch Carry Estimate Estimator Loss Params Step",
    },
    modules={
        "analysis": "analysis",
        "cells": "cells",
        "clipping": "clipping",
        "experiments": "experiments",
        "interop": "interop",
        "plots": "report.plots",
        "powers": "analysis.linalg.powers",
        "tasks": "experiments.tasks",
        "testing": "testing",
        "truncation": "truncation",
    },
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = _version()
        return globals()[name]
    return _get(name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("jbptt")
    except PackageNotFoundError:  # a source tree that was not installed
        return "0+unknown"
