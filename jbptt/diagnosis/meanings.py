"""What each line of a diagnosis means, and how it was found: for `Diagnosis.explain`."""

LOSS = (
    "The weighted mean loss of this batch, and what it would be if every prediction were the "
    "mean of all of the model's predictions. A model that is no better has learnt nothing of "
    "its inputs."
)
SOURCES = (
    "The window of the last steps from which on ‖ĝ − g‖ / ‖g‖ stays within 50, 10 and 1 % on "
    "this batch. g is the exact gradient, ĝ what sliding windows leave of it. Measured at every "
    "window up to 16 and at four to an octave beyond."
)
DECAY = (
    "How much of a loss's adjoint, its derivative in the carry, is left after so many steps back. "
    "The half-life is where half of it is lost for good: in the first steps, where the long run "
    "(state) may be slower. The shape is the simplest curve that fits what was measured to 10 %."
)
ARRIVES = (
    "Lags are measured until less than 10⁻⁴ of the gradient is left and less than 1 % arrives, "
    "so this is where measuring ended. A mean over losses, each compared with what it sent "
    "itself."
)
JUMP = (
    "The readout reads something of its own step that no older step reaches; what is left after "
    "it is what recurs."
)
LEAVES = "Adjoints are measured over all leaves of the carry together; here they are apart."
EXAMPLES = "The mean over examples tells neither of these stories."
STATE = (
    "The leading Lyapunov exponent of the step's Jacobians and, as a factor, e to its power: how "
    "fast the slowest part of an adjoint fades or grows. ± is the largest of three errors: over "
    "stretches of time, halves, and two starts."
)
PARTS = (
    "The batch is divided into up to 16 groups of examples, or stretches of time where examples "
    "are fewer. Windows are recommended from how these parts differ. Noise makes their norms "
    "larger than the whole batch's."
)
CURVATURE = (
    "The second derivative of the loss along its gradient. Gradient descent overshoots above 2 "
    "/ curvature; along other directions it may be larger, so that less may be unstable too."
)
WINDOWS = (
    "Sliding: from this window on the error stays within the bound. Block: the shortest block "
    "tried that does. Each on 95 % of the batches that are drawn from the parts of this one (a "
    "wild bootstrap), so that it holds on fresh data of the same kind; a window that is enough on "
    "this batch alone (sources) may be shorter. Times are the quartiles of this machine's, each "
    "repeat beside full BPTT in the same repeat; memory is what XLA plans to use beside "
    "arguments and results."
)
