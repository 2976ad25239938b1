"""How far back does the gradient of your recurrent model reach, and what does each truncation cost?"""

from jbptt import cells, truncation
from jbptt.estimators import full_bptt, gated_bptt, randomized_bptt, truncated_bptt
from jbptt.recurrence import unroll
from jbptt.types import Batch, Estimate, Estimator, Loss, Step
