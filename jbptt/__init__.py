"""How far back does the gradient of your recurrent model reach, and what does each truncation cost?"""

from jbptt import cells, clipping, testing, truncation
from jbptt.adaptive import adaptive_bptt
from jbptt.analysis import powers
from jbptt.analysis.alignment import AdjointAlignment, adjoint_alignment
from jbptt.analysis.comparison import Comparison, Cost, compare, measure_cost
from jbptt.analysis.diagnosis import diagnose
from jbptt.analysis.findings import Diagnosis
from jbptt.analysis.flow import Adjoints, GradientSources, adjoints, gradient_flow, gradient_sources
from jbptt.analysis.gating import GatePaths, gate_paths
from jbptt.analysis.jacobians import step_jacobians
from jbptt.analysis.lags import LagProfile, TruncationCurve, lag_profile, truncation_curve
from jbptt.analysis.lyapunov import LyapunovSpectrum, lyapunov_spectrum
from jbptt.analysis.nonfinite import NonFinite, find_nonfinite
from jbptt.analysis.products import JacobianProducts, jacobian_products
from jbptt.analysis.schedules import Schedule, optimize_schedule
from jbptt.estimators import full_bptt, gated_bptt, randomized_bptt, truncated_bptt
from jbptt.experiments import tasks
from jbptt.experiments.remedies import Remedies, compare_remedies
from jbptt.experiments.training import History, train
from jbptt.recurrence import unroll
from jbptt.report import plots
from jbptt.types import Batch, Carry, Estimate, Estimator, Loss, Params, Step
