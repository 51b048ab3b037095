"""The metrics that come with quantlab, one a file."""

from quantlab.evaluation.metrics.accuracy import Accuracy
from quantlab.evaluation.metrics.fid import Fid, FidToTeacher
from quantlab.evaluation.metrics.inception_score import InceptionScoreMetric
from quantlab.evaluation.metrics.paired_error import PairedError
from quantlab.evaluation.metrics.precision_recall import PrecisionRecall

METRICS = (Fid, FidToTeacher, InceptionScoreMetric, PrecisionRecall, Accuracy, PairedError)
"""As ``evaluate.metrics`` names them."""
